# SPDX-License-Identifier: Apache-2.0
"""Tiny random models: a Qwen2.5-VL for every test that needs a model, and one of each family."""

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Not a cluster that happens to run on this machine.
os.environ["RAY_ADDRESS"] = "local"

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from avar_verl.roles import RoleMap
from avar_verl.tools.demo import photo_grid
from tests.model.families.tiny import build_tiny

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Where pytest-xdist shares files out, long ones go first: none is left to one process at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.fixture(scope="session")
def tiny_model_path(family_path):
    return family_path("qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_processor(tiny_model_path):
    return AutoProcessor.from_pretrained(tiny_model_path)


@pytest.fixture(scope="session")
def tiny_config(tiny_model_path):
    return AutoConfig.from_pretrained(tiny_model_path)


@pytest.fixture(scope="session")
def role_map(tiny_processor, tiny_config):
    return RoleMap.from_pretrained(tiny_processor, tiny_config)


@pytest.fixture(scope="session")
def load_tiny(tiny_model_path):
    """`load_tiny(attn_implementation)` -> a fresh float32 model in evaluation mode."""

    def load(attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32):
        return AutoModelForImageTextToText.from_pretrained(
            tiny_model_path, dtype=dtype, attn_implementation=attn_implementation
        ).eval()

    return load


@pytest.fixture
def tiny_model(request, load_tiny):
    """A fresh float32 model with sdpa, or with the attention of an indirect parametrization, such as "eager"."""
    return load_tiny(getattr(request, "param", "sdpa"))


@pytest.fixture(scope="session")
def encode(tiny_processor):
    """`encode(n, padding_side)` -> processor inputs of n photo-grid samples with their responses."""

    def run(n: int = 3, padding_side: str = "right"):
        samples = photo_grid.make_samples(n, 0, "train")
        texts = [
            tiny_processor.apply_chat_template(
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": sample.response}]},
                ]
            )
            for sample in samples
        ]
        images = [sample.image for sample in samples]
        return tiny_processor(text=texts, images=images, padding=True, padding_side=padding_side, return_tensors="pt")

    return run


@pytest.fixture(scope="session")
def family_path(tmp_path_factory):
    """`family_path(model_type)` -> the folder of the family's tiny model, built once."""
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda model_type: build_tiny(model_type, folder / model_type))


@pytest.fixture(scope="session")
def family_processor(family_path):
    """`family_processor(model_type)` -> its processor."""
    return functools.cache(lambda model_type: AutoProcessor.from_pretrained(family_path(model_type)))


@pytest.fixture(scope="session")
def family_model(family_path):
    """`family_model(model_type)` -> its model in float32, with sdpa, in evaluation mode. Leave it as it is."""
    return functools.cache(
        lambda model_type: AutoModelForImageTextToText.from_pretrained(
            family_path(model_type), attn_implementation="sdpa"
        ).eval()
    )
