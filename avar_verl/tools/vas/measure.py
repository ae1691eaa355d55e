# SPDX-License-Identifier: Apache-2.0
"""Measure a checkpoint: attention masses of given responses, and answers of its own.

Plain transformers; no verl, no vllm. Any family: a conversation becomes ids and features by `render`, and a batch by
`collate`, as in training. What `avar vas` is made of: `avar_verl.tools.vas`.

Shape suffixes:
    B = samples, S = positions, Q = selected queries, L = layers, H = query heads, R = token roles, I = image tokens,
    G = key groups
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from avar_verl.attention import capture_mass
from avar_verl.model.checkpoint import Checkpoint, batches, generate_ids
from avar_verl.model.render import Rendered, render
from avar_verl.model.roles import TokenRole
from avar_verl.objectives.vas import VasSums, vas_sums

QUERIES = {"user": TokenRole.USER, "response": TokenRole.RESPONSE}


@dataclass(frozen=True)
class Item:
    """A prompt with its images and a reference response."""

    prompt: str
    images: tuple[Image.Image, ...]
    response: str

    def messages(self, response: str | None) -> list[dict]:
        """The conversation, images first; without an answer where `response` is None."""
        content = [*({"type": "image", "image": image} for image in self.images), {"type": "text", "text": self.prompt}]
        question = {"role": "user", "content": content}
        return [question] if response is None else [question, {"role": "assistant", "content": response}]


def generate(checkpoint: Checkpoint, items: Sequence[Item], max_new_tokens: int, batch_size: int = 32) -> list[str]:
    """Greedy responses, decoded without special tokens (`generate_ids`)."""
    out = []
    for _, batch in batches(items, batch_size, "generate"):
        prompts = [render(checkpoint.processor, item.messages(None), add_generation_prompt=True) for item in batch]
        ids = generate_ids(checkpoint, prompts, max_new_tokens)
        out += checkpoint.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
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
        answered = zip(batch, responses[start : start + len(batch)], strict=True)
        inputs = checkpoint.collate([render(checkpoint.processor, item.messages(text)) for item, text in answered])
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
def attention_to_image_tokens(
    checkpoint: Checkpoint,
    rendered: Rendered,
    roles_S: torch.Tensor,
    chosen_S: torch.Tensor,
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Attention of every chosen query to every image token of one sample, (Q, I) float32, mean over layers and heads.

    Args:
        chosen_S: bool, the queries.
        layers: default all.

    Raises:
        ValueError: nothing chosen, or no image.
    """
    image_S = roles_S == TokenRole.IMAGE
    num_image = int(image_S.sum())
    if not num_image or not bool(chosen_S.any()):
        raise ValueError(
            f"image attention needs image tokens and selected queries; got {num_image} and {int(chosen_S.sum())}. "
            "Check the sample and what `select` matches."
        )
    # One key group for every image token, group 0 for all other keys.
    groups_S = image_S.long().cumsum(0) * image_S
    query_roles_S = torch.where(chosen_S, TokenRole.RESPONSE, TokenRole.OTHER)
    device = checkpoint.model.device
    with capture_mass(
        checkpoint.model,
        query_roles_S[None].to(device),
        layers=layers,
        query_role=TokenRole.RESPONSE,
        reduction=lambda mass_BHQG, _: mass_BHQG[0, :, :, 1:].mean(0),
        key_groups=groups_S[None].to(device),
        num_groups=num_image + 1,
    ) as captured:
        checkpoint.model(**checkpoint.collate([rendered]), use_cache=False)
    return torch.stack(captured.per_layer()).mean(0).cpu()


def image_attention(
    checkpoint: Checkpoint, item: Item, response: str, select: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Attention of chosen response tokens to every image token, (I,) float32: mean over these tokens, layers and heads.

    Args:
        select: `select(ids_S) -> (S,) bool`, the queries among the token ids of the whole sample.

    Raises:
        ValueError: nothing selected, or no image.
    """
    rendered = render(checkpoint.processor, item.messages(response))
    ids_S = rendered.ids_S
    roles_S = checkpoint.role_map(ids_S[None], torch.ones_like(ids_S)[None])[0]
    return attention_to_image_tokens(checkpoint, rendered, roles_S, select(ids_S)).mean(0)


__all__ = [
    "QUERIES",
    "Checkpoint",
    "Item",
    "attention_to_image_tokens",
    "generate",
    "generate_ids",
    "image_attention",
    "measure_vas",
]
