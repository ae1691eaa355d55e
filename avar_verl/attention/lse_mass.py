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
from collections import deque
from collections.abc import Sequence
from functools import cached_property

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from avar_verl.attention.visibility import HIDDEN, Visibility

# Scores of one chunk: 1 MiB of float32, which a CPU writes to its cache three times as fast as to memory.
CHUNK_ELEMENTS = 2**18
# Visibilities that are looked at together, B * Q * W.
LOOK_ELEMENTS = 2**22
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
        self._looks: deque[tuple[Visibility, bool]] = deque(maxlen=2)  # Layers have one kind of mask or two.

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
    def rows_BW(self) -> torch.Tensor:
        """The keys' rows among those of all samples, B * S."""
        B, S = self.key_roles_BS.shape
        return S * torch.arange(B, device=self.positions_BW.device)[:, None] + self.positions_BW

    @cached_property
    def padding_BW(self) -> torch.Tensor | None:
        """Added to a key's scores: HIDDEN on padding, else 0; None without padding."""
        if bool(self.real_BW.all()):
            return None
        return torch.zeros(self.real_BW.shape, device=self.real_BW.device).masked_fill_(~self.real_BW, HIDDEN)

    def all_seen(self, visibility: Visibility, valid_BQ: torch.Tensor | None) -> bool:
        """Whether every valid query sees all of its sample's keys. One look for all layers with the same visibility."""
        for known, seen in self._looks:
            if known is visibility:
                return seen
        seen = self._look(visibility, valid_BQ)
        self._looks.append((visibility, seen))
        return seen

    def _look(self, visibility: Visibility, valid_BQ: torch.Tensor | None) -> bool:
        positions_BQ = visibility.positions_BQ
        if visibility.is_causal_only:
            last_B1 = self.span_B1[1]
            seen_BQ = positions_BQ >= last_B1
            return bool((seen_BQ if valid_BQ is None else seen_BQ | ~valid_BQ).all())
        step = max(1, LOOK_ELEMENTS // max(1, self.positions_BW.numel()))
        for start in range(0, positions_BQ.shape[1], step):
            stop = min(start + step, positions_BQ.shape[1])
            seen_BC = (visibility.of_keys(start, stop, self.positions_BW) | ~self.real_BW[:, None]).all(-1)
            if not bool((seen_BC if valid_BQ is None else seen_BC | ~valid_BQ[:, start:stop]).all()):
                return False
        return True

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
    valid_BQ: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masses of the roles of `keys`, (B, H, Q, R) float32; nan in the other columns.

    The rows of queries that see no key, and of those that are not valid, are undefined (nan or inf).

    Args:
        lse_BHQ: natural log-sum-exp of the scaled scores over the keys that each query sees.
        valid_BQ: False on queries that nobody reads; default: all are read.
    """
    B, H, Q, D = query_BHQD.shape
    K, S = key_BKSD.shape[1:3]
    G, W = H // K, keys.bounds[-1]
    # Base 2, whose exponential is cheaper; the log-sum-exp and the padding are part of the product:
    # q . k - lse + padding = [q, -lse, 1] . [k, 1, padding].
    width = D + (1 if keys.padding_BW is None else 2)
    query = query_BHQD.new_empty(B, K, Q, G, width, dtype=torch.float32)
    query[..., :D].copy_(query_BHQD.view(B, K, G, Q, D).transpose(2, 3)).mul_(scale * math.log2(math.e))
    query[..., D].copy_(lse_BHQ.view(B, K, G, Q).transpose(2, 3)).mul_(-math.log2(math.e))
    key = query.new_empty(B, K, W, width)
    rows_BWKD = key_BKSD.transpose(1, 2).reshape(B * S, K * D).index_select(0, keys.rows_BW.flatten()).view(B, W, K, D)
    key[..., :D].copy_(rows_BWKD.transpose(1, 2))
    key[..., D] = 1.0
    if keys.padding_BW is not None:
        query[..., D + 1] = 1.0
        key[..., D + 1].copy_(keys.padding_BW[:, None].expand(B, K, W))
    query, key = query.view(B, K, Q * G, width), key.view(B * K, W, width).mT

    all_seen = keys.all_seen(visibility, valid_BQ)
    # Short samples share a chunk, long ones are several: each product is over as many rows of a sample as fit.
    num_samples = max(1, min(B, CHUNK_ELEMENTS // max(1, H * Q * W)))
    num_queries = max(1, min(Q, CHUNK_ELEMENTS // max(1, num_samples * H * W)))
    buffer = query.new_empty(num_samples * K, num_queries * G, W)
    sums = query.new_empty(len(keys.columns), B, K, Q * G)
    for sample in range(0, B, num_samples):
        samples = slice(sample, min(sample + num_samples, B))
        own, positions_BW = visibility.of_samples(samples), keys.positions_BW[samples]
        for start in range(0, Q, num_queries):
            stop = min(start + num_queries, Q)
            chunk = query[samples, :, start * G : stop * G].flatten(0, 1)
            weights = buffer[: chunk.shape[0], : chunk.shape[1]]
            torch.bmm(chunk, key[samples.start * K : samples.stop * K], out=weights)
            if not all_seen:
                hidden_BCW = ~own.of_keys(start, stop, positions_BW)
                weights.view(-1, K, stop - start, G, W).masked_fill_(hidden_BCW[:, None, :, None], HIDDEN)
            torch.exp2(weights, out=weights)
            for column, (first, last) in enumerate(zip(keys.bounds[:-1], keys.bounds[1:], strict=True)):
                out = sums[column, samples, :, start * G : stop * G].flatten(0, 1)
                torch.sum(weights[..., first:last], dim=-1, out=out)
    mass_BHQR = query.new_full((B, H, Q, num_groups), float("nan"))
    for column, role in enumerate(keys.columns):
        mass_BHQR[..., role].view(B, K, G, Q).copy_(sums[column].view(B, K, Q, G).transpose(2, 3))
    return mass_BHQR
