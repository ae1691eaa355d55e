# SPDX-License-Identifier: Apache-2.0
"""The obvious formula, with the full matrix: what the fast one is compared with."""

import torch

from avar_verl.roles import TokenRole


def eager_mass(query, key, roles, attention_mask=None, segment_ids=None, positions=None, scale=None):
    """Masses from the whole (B, H, S, S) matrix, in the dtype of the inputs."""
    B, H, S, D = query.shape
    key = key.repeat_interleave(H // key.shape[1], dim=1)
    scores = query @ key.mT * (D**-0.5 if scale is None else scale)
    visible = torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None])
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    if attention_mask is not None:
        weights = weights * attention_mask[:, None, :, None].to(weights.dtype)
    onehot = torch.nn.functional.one_hot(roles, len(TokenRole)).to(weights.dtype)
    mass = weights @ onehot[:, None]
    return mass if positions is None else mass[:, :, positions]
