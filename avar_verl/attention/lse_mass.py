# SPDX-License-Identifier: Apache-2.0
"""Attention mass from the log-sum-exp of the model's own attention; forward only.

    mass_r(q) = sum_{k in role r} exp(scale * q . k - lse(q)),    lse(q) = log sum_{visible k} exp(scale * q . k)

Only the keys of the requested roles are scored, without a maximum, a normalisation or a second product. This is the
cheapest implementation if the log-sum-exp is available and no gradient is needed. (A gradient would need all keys
again, as in the other implementations.)

The log-sum-exp is the second output of torch's fused attentions, which `scaled_dot_product_attention` drops. `LseTap`
reads it during the model's own call, which stays bit-identical. On a GPU, two of the three attentions compute it only
if asked, and `LseTap` asks; there the masses are those of `triton_mass.triton_lse_mass`.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, C = queries of one chunk, H = query heads, K = key/value
    heads, G = query heads of one key head (H / K), D = head size, W = keys of the requested roles, R = token roles
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_verl.attention.visibility import HIDDEN, Visibility

# Elements of one chunk's scores, B * H * C * W: 8 MiB of float32.
CHUNK_ELEMENTS = 2**21
# (output (B, H, S, D), lse (B, H, S) float32, natural logarithm, over the visible keys)
_ATTENTIONS = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
)
# The same, if the fifth argument, `compute_log_sumexp`, is true; (B, H, S, 1) in cuDNN's, S rounded up in the other.
_ON_REQUEST = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


class LseTap(TorchDispatchMode):
    """Collects the log-sum-exp of every fused attention of torch that runs inside the `with` block.

    Relies on: torch 2.11, aten/src/ATen/native/transformers/attention.cpp, `_scaled_dot_product_flash_attention_cpu`;
    cuda/attention.cu, `_scaled_dot_product_{flash,cudnn,efficient}_attention_cuda`.
    """

    def __init__(self):
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = (*args[:4], True, *args[5:]) if func in _ON_REQUEST else args
        out = func(*given, **(kwargs or {}))
        if func in _ATTENTIONS or func in _ON_REQUEST:
            lse = out[1].squeeze(-1) if out[1].dim() == 4 else out[1]
            self.found.append(lse[..., : args[0].shape[2]])
        return out

    def lse(self, batch: int, heads: int, length: int) -> torch.Tensor | None:
        """(B, H, S) of one call, or of consecutive calls for the segments of one row; None if other calls ran.

        Calls with another shape do not belong to this layer.
        """
        if not self.found or any(x.dim() != 3 or tuple(x.shape[:2]) != (batch, heads) for x in self.found):
            return None
        joined = self.found[0] if len(self.found) == 1 else torch.cat(self.found, dim=2)
        return joined if joined.shape[2] == length else None


class KeysByRole:
    """The keys of some roles, the same for every layer of a forward pass; computed when first asked for."""

    def __init__(self, key_roles_BS: torch.Tensor, columns: Sequence[int]):
        self.key_roles_BS = key_roles_BS
        self.columns = tuple(columns)

    @cached_property
    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        positions, real, bounds = [], [], [0]
        for role in self.columns:
            is_role_BS = self.key_roles_BS == role
            count_B = is_role_BS.sum(1)
            width = int(count_B.max()) if count_B.numel() else 0
            # A stable sort moves the role's positions to the front, in order.
            positions.append(torch.argsort(~is_role_BS, dim=1, stable=True)[:, :width])
            real.append(torch.arange(width, device=is_role_BS.device) < count_B[:, None])
            bounds.append(bounds[-1] + width)
        return torch.cat(positions, dim=1), torch.cat(real, dim=1), bounds

    @property
    def positions_BW(self) -> torch.Tensor:
        """The positions of the keys, one role after the other."""
        return self._sorted[0]

    @property
    def real_BW(self) -> torch.Tensor:
        """False on the padding of samples that have fewer keys of a role."""
        return self._sorted[1]

    @property
    def bounds(self) -> list[int]:
        """For each of `columns` its range `bounds[i]..bounds[i + 1]` of W."""
        return self._sorted[2]

    @cached_property
    def all_real(self) -> bool:
        return bool(self.real_BW.all())

    @cached_property
    def span_B1(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the last position of any of these keys; (S, -1) without one. Does not synchronise."""
        S = self.key_roles_BS.shape[1]
        wanted_BS = torch.zeros_like(self.key_roles_BS, dtype=torch.bool)
        for role in self.columns:
            wanted_BS |= self.key_roles_BS == role
        position_S = torch.arange(S, device=wanted_BS.device, dtype=torch.int32)
        first_B1 = torch.where(wanted_BS, position_S, S).amin(1, keepdim=True)
        return first_B1, torch.where(wanted_BS, position_S, -1).amax(1, keepdim=True)


def lse_mass(
    query_BHQD: torch.Tensor,
    key_BKSD: torch.Tensor,
    lse_BHQ: torch.Tensor,
    keys: KeysByRole,
    visibility: Visibility,
    scale: float,
    num_groups: int,
) -> torch.Tensor:
    """Masses of the roles of `keys`, (B, H, Q, R) float32; nan in the other columns.

    The rows of queries that see no key are undefined (nan or inf).

    Args:
        lse_BHQ: natural log-sum-exp of the scaled scores over the keys that each query sees.
    """
    B, H, Q, D = query_BHQD.shape
    K = key_BKSD.shape[1]
    G = H // K
    mass_BKGQR = query_BHQD.new_full((B, K, G, Q, num_groups), float("nan"), dtype=torch.float32)
    W = keys.bounds[-1]
    index = keys.positions_BW[:, None, :, None].expand(-1, K, -1, D)
    key_BKWD = key_BKSD.gather(2, index).float()
    # Base 2, whose exponential is cheaper; the log-sum-exp is part of the product: q . k - lse = [q, -lse] . [k, 1].
    query = torch.cat([query_BHQD.float() * scale, -lse_BHQ.float()[..., None]], dim=-1) * math.log2(math.e)
    query = query.reshape(B, K, G, Q, D + 1)
    key = torch.cat([key_BKWD, key_BKWD.new_ones(B, K, W, 1)], dim=-1).mT
    chunk = max(1, CHUNK_ELEMENTS // max(1, B * H * W))
    buffer = query.new_empty(B * K, G * min(chunk, Q), W)
    for start in range(0, Q, chunk):
        stop = min(start + chunk, Q)
        rows = query[:, :, :, start:stop].reshape(B * K, G * (stop - start), D + 1)
        weights = buffer[:, : rows.shape[1]]
        torch.bmm(rows, key.reshape(B * K, D + 1, W), out=weights)
        if not (keys.all_real and visibility.sees_all(start, stop, keys.positions_BW)):
            hidden_BCW = ~(visibility.of_keys(start, stop, keys.positions_BW) & keys.real_BW[:, None])
            weights.view(B, K, G, stop - start, W).masked_fill_(hidden_BCW[:, None, None], HIDDEN)
        torch.exp2(weights, out=weights)
        for role, first, last in zip(keys.columns, keys.bounds[:-1], keys.bounds[1:], strict=True):
            mass_BKGQR[:, :, :, start:stop, role] = weights[..., first:last].sum(-1).view(B, K, G, stop - start)
    return mass_BKGQR.reshape(B, H, Q, num_groups)
