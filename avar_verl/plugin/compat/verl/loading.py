# SPDX-License-Identifier: Apache-2.0
"""Weights of the model that verl trains: missing and unexpected ones are an error.

`FSDPEngine._build_module` (verl/workers/engine/fsdp/transformer_impl.py:233-243) asks `get_hf_auto_model_class` for a
class, calls its `from_pretrained`, and silences the warnings: a folder without some weights is trained from random
ones, with exit code 0.
"""

import functools
from typing import Any

from avar_verl.model.checkpoint import load_weights
from avar_verl.plugin.compat.replace import replace


class Checked:
    """An auto class of transformers whose `from_pretrained` is `model.checkpoint.load_weights`."""

    def __init__(self, auto_class: Any):
        self._auto_class = auto_class

    def __getattr__(self, name: str) -> Any:
        return getattr(self._auto_class, name)

    def from_pretrained(self, pretrained_model_name_or_path, **kwargs: Any) -> Any:
        return load_weights(self._auto_class, pretrained_model_name_or_path, **kwargs)


def apply(model_module) -> None:
    """Wrap `get_hf_auto_model_class` of `verl.utils.model`."""
    original = model_module.get_hf_auto_model_class

    @functools.wraps(original)
    def get_hf_auto_model_class(hf_config):
        return Checked(original(hf_config))

    replace(model_module, "get_hf_auto_model_class", get_hf_auto_model_class)
