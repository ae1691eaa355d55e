# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of tiny models, conversations, and the masses of a full attention matrix."""

import functools

import pytest
import torch
from transformers import AutoModelForImageTextToText

from avar_verl.data.messages import read_messages
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.roles import RoleMap
from avar_verl.tools.rows import Conversation
from tests.model.families.tiny import sample_messages


@pytest.fixture(scope="session")
def family_checkpoint(family_processor, family_model):
    """`family_checkpoint(model_type)` -> `Checkpoint` of its tiny model."""

    @functools.cache
    def load(model_type: str) -> Checkpoint:
        model, processor = family_model(model_type), family_processor(model_type)
        return Checkpoint(model, processor, RoleMap.from_pretrained(processor, model.config))

    return load


@pytest.fixture(scope="session")
def eager_checkpoint(family_path, family_checkpoint):
    """`eager_checkpoint(model_type)` -> the same model with attention that returns its matrix."""

    @functools.cache
    def load(model_type: str) -> Checkpoint:
        model = AutoModelForImageTextToText.from_pretrained(family_path(model_type), attn_implementation="eager").eval()
        same = family_checkpoint(model_type)
        return Checkpoint(model, same.processor, same.role_map)

    return load


def conversation(
    n_images: int = 1, turns_count: int = 1, *, turns: bool = True, seed: int = 0, **kwargs
) -> Conversation:
    """One that `rows.conversation` could have made: photographs, a system turn, reference answers."""
    messages = sample_messages(n_images, **{"system": True, **kwargs}, turns=turns_count, seed=seed)
    messages = read_messages(messages, markers=False)
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    return Conversation(messages, answer, turns=turns)


def attention_matrix(checkpoint: Checkpoint, sample, layers) -> torch.Tensor:
    """(L, H, S, S) float64 attention of a single sample."""
    with torch.no_grad():
        out = checkpoint.model(**checkpoint.collate([sample.rendered]), use_cache=False, output_attentions=True)
    return torch.stack([out.attentions[layer][0] for layer in layers]).double()


def leaves(value) -> list:
    """What stands in nested dicts and lists, in a fixed order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in leaves(value[key])]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def assert_same(one, other, rel: float = 1e-5) -> None:
    """Nested dicts and lists with the same keys, texts and, up to rounding, numbers."""
    assert one.keys() == other.keys()
    for key in one:
        pairs = list(zip(leaves(one[key]), leaves(other[key]), strict=True))
        numbers = [pair for pair in pairs if isinstance(pair[0], int | float) and isinstance(pair[1], int | float)]
        assert [mine for mine, _ in numbers] == pytest.approx([theirs for _, theirs in numbers], rel=rel), key
        assert all(mine == theirs for mine, theirs in pairs if (mine, theirs) not in numbers), key
