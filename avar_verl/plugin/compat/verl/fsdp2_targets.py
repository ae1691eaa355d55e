# SPDX-License-Identifier: Apache-2.0
"""FSDP2 units: of the embeddings, only that of the words is one.

verl makes every `nn.Embedding` of an untied model an FSDP2 unit (verl/utils/fsdp_utils.py:549-570), the position tables
of vision towers too. CLIP's and SigLIP's stand inside a module that is a unit as well, and sharding the outer one first
ends in "Cannot concatenate overlapping meshes" (LLaVA). GLM-4.1V reads its table without calling the module, so that it
stays sharded ("got mixed torch.Tensor and DTensor"). Left out here, they are part of the unit around them.
"""

import functools

import torch

from avar_verl.plugin.compat.replace import replace


def apply(fsdp_utils) -> None:
    """Wrap `_select_fsdp2_wrap_targets` of `verl.utils.fsdp_utils`."""
    original = fsdp_utils._select_fsdp2_wrap_targets

    @functools.wraps(original)
    def _select_fsdp2_wrap_targets(model, fsdp_transformer_layer_cls_to_wrap):
        words = model.get_input_embeddings()
        targets = original(model, fsdp_transformer_layer_cls_to_wrap)
        return [module for module in targets if module is words or not isinstance(module, torch.nn.Embedding)]

    replace(fsdp_utils, "_select_fsdp2_wrap_targets", _select_fsdp2_wrap_targets)
