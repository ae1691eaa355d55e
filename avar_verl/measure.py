# SPDX-License-Identifier: Apache-2.0
"""Measure a checkpoint: attention masses of given responses, and answers of its own.

Plain transformers; no verl, no vllm.

Shape suffixes:
    B = samples, S = positions, Q = selected queries, L = layers, H = query heads, R = token roles, I = image tokens
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from avar_verl.attention import capture_mass
from avar_verl.objectives.vas import VasSums, vas_sums
from avar_verl.roles import RoleMap, TokenRole

QUERIES = {"user": TokenRole.USER, "response": TokenRole.RESPONSE}


@dataclass(frozen=True)
class Item:
    """A prompt with its images and a reference response."""

    prompt: str
    images: tuple[Image.Image, ...]
    response: str


@dataclass(frozen=True)
class Checkpoint:
    """A model with its processor and role map, ready to measure."""

    model: torch.nn.Module
    processor: object
    role_map: RoleMap

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Checkpoint":
        """Load a Hugging Face folder.

        Raises:
            ValueError: a family that `RoleMap` does not know.
        """
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        return cls(model.to(device).eval(), processor, RoleMap.from_pretrained(processor, model.config))

    def inputs(self, items: Sequence[Item], responses: Sequence[str] | None, padding_side: str) -> dict:
        """Processor inputs of a batch: prompts alone with the header of the answer, or followed by `responses`."""
        texts = []
        for index, item in enumerate(items):
            content = [*({"type": "image"} for _ in item.images), {"type": "text", "text": item.prompt}]
            messages = [{"role": "user", "content": content}]
            if responses is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": responses[index]}]})
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=responses is None))
        images = [image for item in items for image in item.images] or None
        encoded = self.processor(
            text=texts, images=images, padding=True, padding_side=padding_side, return_tensors="pt"
        )
        return encoded.to(self.model.device)


def batches(items: Sequence, size: int, label: str) -> Iterable[tuple[int, Sequence]]:
    """(start, items[start : start + size]) under a progress bar."""
    for start in tqdm(range(0, len(items), size), desc=label, leave=False):
        yield start, items[start : start + size]


@torch.no_grad()
def generate(checkpoint: Checkpoint, items: Sequence[Item], max_new_tokens: int, batch_size: int = 32) -> list[str]:
    """Greedy responses, decoded without special tokens."""
    out = []
    for _, batch in batches(items, batch_size, "generate"):
        inputs = checkpoint.inputs(batch, None, "left")
        ids = checkpoint.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        out += checkpoint.processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return out


@torch.no_grad()
def measure_vas(
    checkpoint: Checkpoint, items: Sequence[Item], responses: Sequence[str] | None = None, batch_size: int = 16
) -> dict[str, VasSums]:
    """VAS sums for user and response queries, teacher-forced on `responses` (default: the references).

    Raises:
        ValueError: from `VasSums.summary`, when no sample has an image, a system turn and a query.
    """
    responses = [item.response for item in items] if responses is None else responses
    total: dict[str, VasSums] = {}
    for start, batch in batches(items, batch_size, "VAS"):
        inputs = checkpoint.inputs(batch, responses[start : start + len(batch)], "right")
        roles_BS = checkpoint.role_map(inputs["input_ids"], inputs["attention_mask"])
        with capture_mass(checkpoint.model, roles_BS, query_role=tuple(QUERIES.values())) as captured:
            checkpoint.model(**inputs, use_cache=False)
        mass_BLHQR = torch.stack(captured.per_layer(), dim=1)
        query_roles_BQ = roles_BS.gather(1, captured.positions)
        for name, role in QUERIES.items():
            sums = vas_sums(mass_BLHQR, roles_BS, captured.valid & (query_roles_BQ == role))
            total[name] = total[name] + sums if name in total else sums
    return total


@torch.no_grad()
def image_attention(
    checkpoint: Checkpoint, item: Item, response: str, select: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Attention of chosen response tokens to every image token, (I,) float32: mean over these tokens, layers and heads.

    Args:
        select: `select(ids_S) -> (S,) bool`, the queries among the token ids of the whole sample.

    Raises:
        ValueError: nothing selected, or no image.
    """
    inputs = checkpoint.inputs([item], [response], "right")
    ids_BS = inputs["input_ids"]
    roles_BS = checkpoint.role_map(ids_BS, inputs["attention_mask"])
    image_BS = roles_BS == TokenRole.IMAGE
    chosen_S = select(ids_BS[0])
    num_image = int(image_BS.sum())
    if not num_image or not bool(chosen_S.any()):
        raise ValueError(
            f"image attention needs image tokens and selected queries; got {num_image} and {int(chosen_S.sum())}. "
            "Check the sample and what `select` matches."
        )
    # One key group for every image token, group 0 for all other keys.
    groups_BS = image_BS.long().cumsum(1) * image_BS
    query_roles_BS = torch.where(chosen_S[None], TokenRole.RESPONSE, TokenRole.OTHER)
    with capture_mass(
        checkpoint.model,
        query_roles_BS,
        query_role=TokenRole.RESPONSE,
        key_groups=groups_BS,
        num_groups=num_image + 1,
    ) as captured:
        checkpoint.model(**inputs, use_cache=False)
    mass_BLHQG = torch.stack(captured.per_layer(), dim=1)
    return mass_BLHQG[0, ..., 1:].mean((0, 1, 2))
