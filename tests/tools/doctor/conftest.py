# SPDX-License-Identifier: Apache-2.0
"""Model folders to examine: sound ones, and copies to break."""

import shutil

import pytest


@pytest.fixture
def folder(tiny_model_path, tmp_path):
    """A copy of the tiny Qwen2.5-VL, to be broken."""
    return shutil.copytree(tiny_model_path, tmp_path / "model")
