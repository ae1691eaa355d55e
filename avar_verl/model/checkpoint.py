# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with its processor and role map: batches of conversations, and greedy responses.

Plain transformers; no verl, no vllm. Works for any family: `render` turns a conversation into ids and features, and
`collate` makes a batch, as in training.

Shape suffixes:
    B = samples, S = positions
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from avar_verl.model.families import Family, get_family
from avar_verl.model.render import Rendered, collate
from avar_verl.model.roles import RoleMap


@dataclass(frozen=True)
class Checkpoint:
    """A model with its processor and role map, ready to measure."""

    model: Any  # A transformers model: to a type checker, its attributes would be tensors.
    processor: Any
    role_map: RoleMap

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Checkpoint":
        """Load a Hugging Face folder.

        Raises:
            ValueError: a family that `RoleMap` does not know, or a folder without a processor.
        """
        processor = AutoProcessor.from_pretrained(path)
        if not hasattr(processor, "tokenizer"):  # AutoProcessor falls back to the tokenizer.
            raise ValueError(
                f"a checkpoint must have a processor for images; got only a {type(processor).__name__} from {path}. "
                "Copy processor_config.json or preprocessor_config.json of the original checkpoint into the folder."
            )
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        return cls(model.to(device).eval(), processor, RoleMap.from_pretrained(processor, model.config))

    @property
    def family(self) -> Family:
        return get_family(self.model.config.model_type)

    def collate(self, samples: Sequence[Rendered], padding_side: str = "right") -> dict[str, torch.Tensor]:
        """Model inputs of a batch, on the model's device."""
        pad_id = self.processor.tokenizer.pad_token_id
        inputs = collate(self.family, self.model.config, samples, 0 if pad_id is None else pad_id, padding_side)
        return {key: value.to(self.model.device) for key, value in inputs.items()}


@torch.no_grad()
def generate_ids(checkpoint: Checkpoint, prompts: Sequence[Rendered], max_new_tokens: int) -> list[list[int]]:
    """Greedy responses to one batch of prompts (rendered with the header of the answer), as token ids.

    A response ends with the token that stopped it. Image placeholders are never generated. Settings of the checkpoint's
    generation config other than sampling apply (Qwen2.5-VL: a repetition penalty).

    Raises:
        ValueError: a batch of several prompts in a family that cannot be padded on the left.
    """
    if checkpoint.family.cross_attention and len(prompts) > 1:
        raise ValueError(
            "a family that reads images in cross-attention layers generates one response at a time (transformers 5.9 "
            f"loses its masks under left padding); got a batch of {len(prompts)}. Use batch_size=1."
        )
    inputs = checkpoint.collate(prompts, "left")
    model = checkpoint.model
    forbidden = list(checkpoint.role_map.image_token_ids) or None
    ids_BS = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, suppress_tokens=forbidden)
    stops = model.generation_config.eos_token_id
    stops = set([stops] if isinstance(stops, int) else stops or ())
    out = []
    for ids in ids_BS[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((index + 1 for index, token in enumerate(ids) if token in stops), len(ids))
        out.append(ids[:end])
    return out
