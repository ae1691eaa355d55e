# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every family, each built once."""

import functools

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.families.tiny import build_tiny


@pytest.fixture(scope="session")
def family_path(tmp_path_factory):
    """`family_path(model_type)` -> the folder of the family's tiny model."""
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
