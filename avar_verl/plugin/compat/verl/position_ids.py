# SPDX-License-Identifier: Apache-2.0
"""3-D position ids of batches whose samples all have the same length.

verl carries the multimodal position ids of a batch as a jagged nested tensor of (4, S_i) matrices.
`torch.nested.as_nested_tensor` makes the first dimension that differs the ragged one; when all S_i are equal nothing
differs, and it takes the 4 as ragged. `verl.utils.tensordict_utils.maybe_fix_3d_position_ids` (tensordict_utils.py:910,
called at engine/base.py:124 and :145, engine_workers.py:252 and :290) then declares the last dimension ragged without
looking at the layout, and the position ids no longer belong to their tokens: the forward pass fails or, worse, runs.
A length cap or a fixed prompt makes such batches the rule. The function below rebuilds the tensor when its layout is
not that of the tokens; otherwise it does what verl's does.
"""

import torch
from tensordict import TensorDict

from avar_verl.plugin.compat.replace import replace


def fix_3d_position_ids(data: TensorDict) -> None:
    """Give the 3-D nested `position_ids` of `data` the layout of its `input_ids`, in place.

    Args:
        data: holds `position_ids`, a nested tensor of B matrices (P, S_i) (P = 4 for Qwen2.5-VL), and `input_ids`, a
            nested tensor of B vectors (S_i,). Anything else is left alone.

    Raises:
        ValueError: the position ids fit the tokens in no layout.
    """
    if "position_ids" not in data.keys():
        return
    position_ids = data["position_ids"]
    if position_ids.dim() != 3 or not position_ids.is_nested:
        return
    if "input_ids" not in data.keys() or not data["input_ids"].is_nested:
        position_ids._ragged_idx = 2
        return
    offsets = data["input_ids"].offsets()
    values = position_ids.values()
    if torch.equal(position_ids.offsets().to(offsets.device), offsets) and values.shape[-1] == int(offsets[-1]):
        position_ids._ragged_idx = 2  # What verl's own function does.
        return
    lengths = offsets.diff()
    batch, length = lengths.numel(), int(lengths[0])
    if not bool((lengths == length).all()) or values.shape[-1] != length or values.shape[0] % batch:
        raise ValueError(
            f"position_ids must hold one row of positions for every token; got values of shape {tuple(values.shape)} "
            f"for samples of lengths {lengths.tolist()}. Rebuild them with the processor's get_rope_index."
        )
    rows = values.shape[0] // batch  # P
    # (B * P, S) -> (P, B * S): sample after sample along the token dimension, as for samples of different lengths.
    packed_PT = values.reshape(batch, rows, length).transpose(0, 1).reshape(rows, batch * length)
    fixed = torch.nested.nested_tensor_from_jagged(packed_PT, offsets=offsets, jagged_dim=2)
    data["position_ids"] = fixed


def apply(tensordict_utils) -> None:
    """Replace `maybe_fix_3d_position_ids` of `verl.utils.tensordict_utils`."""
    replace(tensordict_utils, "maybe_fix_3d_position_ids", fix_3d_position_ids)
