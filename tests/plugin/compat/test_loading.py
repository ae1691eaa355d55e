# SPDX-License-Identifier: Apache-2.0
"""The class that verl's engine loads its model with."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from avar_verl.plugin.compat.verl import loading


def test_it_loads_whole_checkpoints_and_refuses_others(tiny_model_path, tmp_path):
    module = SimpleNamespace(get_hf_auto_model_class=lambda hf_config: AutoModelForImageTextToText)
    loading.apply(module)
    config = AutoConfig.from_pretrained(tiny_model_path)
    auto_class = module.get_hf_auto_model_class(hf_config=config)
    assert auto_class._model_mapping is AutoModelForImageTextToText._model_mapping

    def load(folder):  # As `FSDPEngine._build_module` does.
        return auto_class.from_pretrained(
            pretrained_model_name_or_path=folder, torch_dtype=torch.float32, config=config, trust_remote_code=False
        )

    assert sum(p.numel() for p in load(tiny_model_path).parameters()) > 0
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"every weight must come from the checkpoint, .*: \d+ missing: .*layers\.1\."):
        load(folder)
