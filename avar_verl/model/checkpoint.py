# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint, here and nowhere else; batches of conversations, and greedy responses.

Plain transformers; no verl, no vllm. Works for any family: `render` turns a conversation into ids and features, and
`collate` makes a batch, as in training.

Shape suffixes:
    B = samples, S = positions
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from avar_verl.model.families import Family, get_family, load_outside
from avar_verl.model.render import Rendered, collate
from avar_verl.model.roles import RoleMap


def load_config(path: str | Path) -> Any:
    """The config of a Hugging Face folder or a name on the hub.

    Raises:
        ValueError: neither of them.
    """
    load_outside()  # They may register the model.
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        adapter = Path(path, "adapter_config.json").is_file()
        raise ValueError(
            f"a model must be a Hugging Face folder or a name on the hub; got {str(path)!r}: {error}. "
            f"{f'It holds an adapter alone. {MERGE}' if adapter else 'Check it.'}"
        ) from error


def load_processor(path: str | Path, **kwargs: Any) -> Any:
    """The processor of a checkpoint.

    Args:
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: a checkpoint without one.
    """
    try:
        processor = AutoProcessor.from_pretrained(path, **kwargs)
        found = type(processor).__name__
    except (OSError, ValueError) as error:  # transformers raises ValueError for a folder without a tokenizer too.
        processor, found = None, str(error)
    if not hasattr(processor, "tokenizer"):  # AutoProcessor falls back to the tokenizer.
        raise ValueError(
            f"a checkpoint must have a processor for images; got from {path}: {found}. Copy processor_config.json or "
            "preprocessor_config.json of the original checkpoint into the folder."
        )
    return processor


# Parts of the names that peft gives to weights.
LORA_NAMES = ("base_model.model.", ".base_layer.", "lora_")
MERGE = (
    "An adapter is merged into its base: `python -m verl.model_merger merge --backend fsdp --local_dir STEP "
    "--target_dir OUT` writes the base of a checkpoint of verl to OUT and the adapter to OUT/lora_adapter, and peft's "
    "PeftModel.from_pretrained(base, 'OUT/lora_adapter').merge_and_unload() is the model to save."
)
SHOWN_NAMES = 3


def check_weights(missing: Iterable[str], unexpected: Iterable[str], path: str | Path, reshaped: Iterable = ()) -> None:
    """Refuse a model whose weights are not those of its files, one and all: transformers initialises others at random.

    Args:
        missing, unexpected: names that the files do not have, and that the model does not have.
        reshaped: (name, shape in the files, shape in the model).

    Raises:
        ValueError: naming the first of each, how many there are, and what to do.
    """
    kinds = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": sorted(f"{name} {tuple(there)} for {tuple(here)}" for name, there, here in reshaped),
    }
    wrong = {kind: names for kind, names in kinds.items() if names}
    if not wrong:
        return
    got = "; ".join(f"{len(names)} {kind}: {', '.join(names[:SHOWN_NAMES])}" for kind, names in wrong.items())
    if any(part in name for name in kinds["unexpected"] for part in LORA_NAMES) and not any(
        "lora_" in name for name in kinds["missing"]
    ):
        todo = f"These are names of a LoRA run. {MERGE}"
    else:
        todo = (
            "Download the missing files again, take the config of the checkpoint, or load the folder with the version "
            "of transformers that wrote it."
        )
    raise ValueError(
        f"every weight must come from the checkpoint, and every weight of it must be used; got from {path}: {got}. "
        f"{todo}"
    )


def load_weights(auto_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """The model that `auto_class.from_pretrained(path, **kwargs)` makes, with the weights of its files and no others.

    Tied weights, names that transformers converts, names that a model class ignores, and buffers that are not saved
    any more count as right.

    Raises:
        ValueError: anything that `check_weights` refuses.
    """
    # With sizes ignored, a weight of another size is named by this check and not by a log line.
    model, info = auto_class.from_pretrained(
        path, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs}
    )
    buffers = {name for name, _ in model.named_buffers()}
    check_weights(info["missing_keys"], set(info["unexpected_keys"]) - buffers, path, info["mismatched_keys"])
    return model


def check_model(path: str | Path) -> None:
    """Whether `load_model` would take the weights of a checkpoint, without a device: a model of any size fits.

    Raises:
        ValueError: anything that `check_weights` refuses.
    """
    load_weights(AutoModelForImageTextToText, path, device_map={"": "meta"})


def load_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype | str = torch.float32, **kwargs: Any
) -> torch.nn.Module:
    """The model of a checkpoint, as its family needs it, in evaluation mode.

    Args:
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: weights that are missing or not used (`check_weights`).
    """
    return ready(load_weights(AutoModelForImageTextToText, path, dtype=dtype, **kwargs), device)


def ready(model: Any, device: str) -> torch.nn.Module:
    """A model as its family needs it, which is how the engine trains it; in evaluation mode."""
    family = get_family(model.config.model_type)
    if family.prepare is not None:
        family.prepare(model)
    return model.to(device).eval()


@dataclass(frozen=True)
class Checkpoint:
    """A model with its processor and role map, ready to measure."""

    model: Any  # A transformers model: to a type checker, its attributes would be tensors.
    processor: Any
    role_map: RoleMap

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: torch.dtype | str = torch.float32) -> "Checkpoint":
        """Load a Hugging Face folder.

        Args:
            dtype: or its name.

        Raises:
            ValueError: a family that `RoleMap` does not know, a folder without a processor, or weights that are missing
                or not used.
        """
        processor = load_processor(path)
        model = load_model(path, device, dtype, attn_implementation="sdpa")
        return cls(model, processor, RoleMap.from_pretrained(processor, model.config))

    @property
    def family(self) -> Family:
        return get_family(self.model.config.model_type)

    def collate(self, samples: Sequence[Rendered], padding_side: str = "right") -> dict[str, torch.Tensor]:
        """Model inputs of a batch, on the model's device."""
        pad_id = self.processor.tokenizer.pad_token_id
        inputs = collate(self.family, self.model.config, samples, pad_id, padding_side)
        return {key: value.to(self.model.device) for key, value in inputs.items()}

    def prompts(self, samples: Sequence[Rendered]) -> dict[str, torch.Tensor]:
        """Model inputs of a batch that is to be answered, rendered with the header of the answer.

        Raises:
            ValueError: several prompts in a family that cannot be padded on the left.
        """
        if self.family.cross_attention and len(samples) > 1:
            raise ValueError(
                "a family that reads images in cross-attention layers generates one response at a time (transformers "
                f"5.9 loses its masks under left padding); got a batch of {len(samples)}. Use batch_size=1."
            )
        return self.collate(samples, "left")

    def responses(self, ids_BS: torch.Tensor, length: int) -> list[tuple[list[int], str]]:
        """(ids, finish reason) of every response that `model.generate` wrote after prompts of `length` positions.

        A response ends with the token that stopped it: "stop", or "length" for one that was cut off.
        """
        stops = self.model.generation_config.eos_token_id
        stops = set([stops] if isinstance(stops, int) else stops or ())
        out = []
        for ids in ids_BS[:, length:].tolist():
            end = next((at + 1 for at, token in enumerate(ids) if token in stops), None)
            out.append((ids[:end], "length" if end is None else "stop"))
        return out


@torch.no_grad()
def generate_ids(checkpoint: Checkpoint, prompts: Sequence[Rendered], max_new_tokens: int) -> list[list[int]]:
    """Greedy responses to one batch of prompts (`Checkpoint.prompts`), as token ids.

    Image placeholders are never generated. Settings of the checkpoint's generation config other than sampling apply
    (Qwen2.5-VL: a repetition penalty).

    Raises:
        ValueError: whatever `Checkpoint.prompts` refuses.
    """
    inputs, model = checkpoint.prompts(prompts), checkpoint.model
    forbidden = list(checkpoint.role_map.image_token_ids) or None
    ids_BS = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=forbidden)
    return [ids for ids, _ in checkpoint.responses(ids_BS, inputs["input_ids"].shape[1])]
