# SPDX-License-Identifier: Apache-2.0
"""Attention mass: how much of each query's attention goes to the keys of each token role.

The full attention matrix is never formed. A chunk of queries meets all keys, the weights are summed by role, and the
chunk is dropped; the backward pass forms the chunk's weights again from q and k.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, C = queries of one chunk, H = query heads,
    K = key/value heads, G = query heads of one key head (H / K), D = head size,
    R = token roles (len(TokenRole)), or any other key groups
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from avar_verl.roles import TokenRole

NUM_ROLES = len(TokenRole)
# Elements of one chunk's weights, B * H * C * S: 4 MiB of float32 stay in a CPU's cache, 64 MiB fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**20, "gpu": 2**24}
IMPLEMENTATIONS = ("auto", "chunked", "triton")
# Limits of the Triton kernels.
MAX_GROUPS, MAX_HEAD_SIZE = 16, 256
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Visibility:
    """Which keys each selected query sees, without the (S, S) mask.

    Either `rows_BQS` says it outright (rows taken from a mask that the model itself built), or a query sees the keys at
    or before its position that are no padding, lie in its segment and, with a window, at most `window - 1` before it.
    """

    positions_BQ: torch.Tensor
    key_mask_BS: torch.Tensor | None = None
    segment_ids_BS: torch.Tensor | None = None
    window: int | None = None
    rows_BQS: torch.Tensor | None = None

    @property
    def is_causal_only(self) -> bool:
        return all(x is None for x in (self.key_mask_BS, self.segment_ids_BS, self.window, self.rows_BQS))

    def chunk(self, start: int, stop: int, first_key: int, last_key: int) -> torch.Tensor:
        """(B, C, keys) bool: which of the keys first_key..last_key the queries start..stop see."""
        if self.rows_BQS is not None:
            return self.rows_BQS[:, start:stop, first_key:last_key]
        positions_BC1 = self.positions_BQ[:, start:stop, None]
        keys_S = torch.arange(first_key, last_key, device=positions_BC1.device)
        visible_BCS = keys_S <= positions_BC1
        if self.window is not None:
            visible_BCS = visible_BCS & (keys_S > positions_BC1 - self.window)
        if self.key_mask_BS is not None:
            visible_BCS = visible_BCS & self.key_mask_BS[:, None, first_key:last_key]
        if self.segment_ids_BS is not None:
            segment_BC1 = self.segment_ids_BS.gather(1, self.positions_BQ[:, start:stop])[:, :, None]
            visible_BCS = visible_BCS & (segment_BC1 == self.segment_ids_BS[:, None, first_key:last_key])
        return visible_BCS

    def chunks(self, size: int, num_keys: int) -> Iterator[tuple[int, int, int, int]]:
        """(start, stop, first, last) of chunks of `size` queries: keys before `first` are visible to all queries of the
        chunk, keys from `last` on to none.

        On the CPU alone: elsewhere reading the positions would wait for the device.
        """
        num_queries = self.positions_BQ.shape[1]
        for start in range(0, num_queries, size):
            stop = min(start + size, num_queries)
            first, last = 0, num_keys
            if self.positions_BQ.device.type == "cpu" and self.rows_BQS is None:
                least, greatest = self.positions_BQ[:, start:stop].aminmax()
                last = min(num_keys, int(greatest) + 1)
                first = int(least) + 1 if self.is_causal_only else 0
            yield start, stop, first, last


def _weights(query_BKGCD, key_BKSD, visibility, start, stop, first, last) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over the visible keys, (B, K, G, C, keys up to `last`) float32, of queries that are already scaled.

    A row that sees nothing comes out uniform; alive_BC is False there.
    """
    weights = torch.einsum("bkgcd,bksd->bkgcs", query_BKGCD[:, :, :, start:stop], key_BKSD[:, :, :last])
    visible_BCS = visibility.chunk(start, stop, first, last)
    weights[..., first:].masked_fill_(~visible_BCS[:, None, None], HIDDEN)
    alive_BC = visible_BCS.any(-1) if first == 0 else visible_BCS.new_ones(()).expand(visible_BCS.shape[:2])
    return torch.softmax(weights, dim=-1), alive_BC


class _ChunkedMass(torch.autograd.Function):
    """mass_r = sum_k p_k [role_k = r] with p = softmax(scale * q . k).

    Backward: d loss / d score_k = p_k (g_{role_k} - sum_r g_r mass_r), with g = d loss / d mass. Only q, k and mass are
    kept between the passes.
    """

    @staticmethod
    def forward(ctx, query_BHQD, key_BKSD, onehot_BSR, visibility, scale):
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        elements = CHUNK_ELEMENTS["cpu" if query_BHQD.device.type == "cpu" else "gpu"]
        ctx.chunk = max(1, elements // max(1, B * H * S))
        ctx.visibility, ctx.scale = visibility, scale
        query = (query_BHQD.float() * scale).reshape(B, K, H // K, Q, D)
        key = key_BKSD.float()
        mass = query.new_zeros(B, K, H // K, Q, onehot_BSR.shape[-1])
        for start, stop, first, last in visibility.chunks(ctx.chunk, S):
            weights, alive_BC = _weights(query, key, visibility, start, stop, first, last)
            chunk = torch.matmul(weights, onehot_BSR[:, None, None, :last])
            mass[:, :, :, start:stop] = chunk * alive_BC[:, None, None, :, None]
        ctx.save_for_backward(query_BHQD, key_BKSD, onehot_BSR, mass)
        return mass.reshape(B, H, Q, mass.shape[-1])  # Q may be 0, which forbids -1.

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHQR):
        query_BHQD, key_BKSD, onehot_BSR, mass = ctx.saved_tensors
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        query = (query_BHQD.float() * ctx.scale).reshape(B, K, H // K, Q, D)
        key = key_BKSD.float()
        grad = grad_BHQR.float().reshape(mass.shape)
        # g_r - sum_r' g_r' mass_r', the bracket of the formula above for every role.
        grad = grad - (grad * mass).sum(-1, keepdim=True)
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for start, stop, first, last in ctx.visibility.chunks(ctx.chunk, S):
            grad_scores, alive_BC = _weights(query, key, ctx.visibility, start, stop, first, last)
            grad_chunk = grad[:, :, :, start:stop] * alive_BC[:, None, None, :, None]
            grad_scores.mul_(torch.matmul(grad_chunk, onehot_BSR[:, None, None, :last].mT))
            grad_query[:, :, :, start:stop] = torch.einsum("bkgcs,bksd->bkgcd", grad_scores, key[:, :, :last])
            grad_key[:, :, :last] += torch.einsum("bkgcs,bkgcd->bksd", grad_scores, query[:, :, :, start:stop])
        grad_query.mul_(ctx.scale)
        return grad_query.reshape(B, H, Q, D).to(query_BHQD.dtype), grad_key.to(key_BKSD.dtype), None, None, None


def choose_implementation(implementation: str, device_type: str, num_groups: int, head_size: int) -> str:
    """`auto` is Triton on a CUDA or ROCm device for at most MAX_GROUPS groups and heads of at most MAX_HEAD_SIZE, and
    PyTorch chunks elsewhere.

    Raises:
        ValueError: an unknown name, or `triton` where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}. Leave it at 'auto'."
        )
    can_triton = device_type == "cuda" and 1 <= num_groups <= MAX_GROUPS and head_size <= MAX_HEAD_SIZE
    if implementation == "triton" and not can_triton:
        raise ValueError(
            f"the Triton kernel needs a CUDA device, at most {MAX_GROUPS} groups and heads of at most {MAX_HEAD_SIZE}; "
            f"got a {device_type} device, {num_groups} groups and heads of {head_size}. Use implementation='auto'."
        )
    return "triton" if can_triton and implementation != "chunked" else "chunked"


def selected_mass(
    query_BHQD: torch.Tensor,
    key_BKSD: torch.Tensor,
    key_roles_BS: torch.Tensor,
    visibility: Visibility,
    valid_BQ: torch.Tensor | None = None,
    scale: float | None = None,
    num_groups: int = NUM_ROLES,
    implementation: str = "auto",
) -> torch.Tensor:
    """Role masses of already selected queries, (B, H, Q, R) float32; 0 where `valid_BQ` is False.

    `attention_mass` is the documented front end; this one takes per-sample query positions, explicit mask rows and any
    grouping of the keys into `num_groups` groups, for example one group for every image token. `implementation` is one
    of IMPLEMENTATIONS (`choose_implementation`).
    """
    scale = query_BHQD.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_implementation(implementation, query_BHQD.device.type, num_groups, query_BHQD.shape[-1])
    with torch.autocast(query_BHQD.device.type, enabled=False):
        if chosen == "triton":
            from avar_verl.attention.triton_mass import triton_mass  # Needs triton, which a CPU may not have.

            mass_BHQR = triton_mass(query_BHQD, key_BKSD, key_roles_BS, visibility, scale, num_groups)
        else:
            onehot_BSR = torch.nn.functional.one_hot(key_roles_BS.long(), num_groups).float()
            mass_BHQR = _ChunkedMass.apply(query_BHQD, key_BKSD, onehot_BSR, visibility, scale)
    return mass_BHQR if valid_BQ is None else mass_BHQR * valid_BQ[:, None, :, None]


def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    key_roles: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention mass of every token role: mass[b, h, q, r] = sum over keys k of role r of A[b, h, q, k].

    Args:
        query: (B, H, S, D), after the rotary embedding.
        key: (B, K, S, D), after the rotary embedding; K divides H (grouped-query attention).
        key_roles: (B, S) integers of `TokenRole`.
        attention_mask: (B, S) bool or 0/1, False hides a padding key and zeroes the row of a padding query. Either
            padding side. Default: no padding.
        segment_ids: (B, S) integers; a query sees the keys of its own segment alone (packed samples). Default: one.
        query_positions: (Q,) positions in [0, S), the same for every sample. Default: all.
        scale: factor of q . k. Default: D ** -0.5.

    Returns:
        (B, H, Q, R) float32, R = len(TokenRole): in [0, 1], sums to 1 over R on every real query, 0 on a padding query.
        Differentiable in query and key; memory grows with B * H * S, never with S * S.

    Raises:
        ValueError: shapes, roles or positions that do not fit.

    Source: arXiv 2603.03825, the masses under Eq. VAS, L_enhance, L_suppress and r_visual.

    >>> q = k = torch.zeros(1, 1, 4, 2)             # equal scores: attention is uniform over the visible keys
    >>> roles = torch.tensor([[1, 2, 2, 3]])        # system image image user
    >>> attention_mass(q, k, roles)[0, 0, 3].tolist()
    [0.0, 0.25, 0.5, 0.25, 0.0]
    """
    if query.dim() != 4 or key.dim() != 4 or query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(
            "query must be (B, H, S, D) and key (B, K, S, D) over the same samples and positions; got "
            f"{tuple(query.shape)} and {tuple(key.shape)}. Pass the tensors as they enter the attention."
        )
    B, H, S, _ = query.shape
    if H % key.shape[1]:
        raise ValueError(
            f"the number of key heads must divide the number of query heads; got {key.shape[1]} and {H}. "
            "Do not repeat or drop heads before the call."
        )
    for name, tensor in [("key_roles", key_roles), ("attention_mask", attention_mask), ("segment_ids", segment_ids)]:
        if tensor is not None and tuple(tensor.shape) != (B, S):
            raise ValueError(
                f"{name} must be (B, S) = {(B, S)}; got {tuple(tensor.shape)}. Give one value for every position."
            )
    if key_roles.numel() and not 0 <= int(key_roles.min()) <= int(key_roles.max()) < NUM_ROLES:
        raise ValueError(
            f"key_roles must hold TokenRole values, 0 to {NUM_ROLES - 1}; got {int(key_roles.min())} to "
            f"{int(key_roles.max())}. Make them with RoleMap."
        )
    if query_positions is None:
        positions_Q, selected = torch.arange(S, device=query.device), query
    else:
        positions_Q = torch.as_tensor(query_positions, device=query.device)
        # A mask or fractions would become positions by conversion alone.
        is_index = positions_Q.dtype != torch.bool and not positions_Q.is_floating_point()
        if positions_Q.dim() != 1 or (
            positions_Q.numel() and not (is_index and 0 <= int(positions_Q.min()) <= int(positions_Q.max()) < S)
        ):
            raise ValueError(
                f"query_positions must be one-dimensional integers in [0, {S}); got {positions_Q.tolist()}. "
                "Select positions that exist; a mask becomes positions with mask.nonzero()[:, 0]."
            )
        positions_Q = positions_Q.long()
        selected = query[:, :, positions_Q]
    mask_BS = None if attention_mask is None else attention_mask.bool()
    visibility = Visibility(positions_Q.expand(B, -1), key_mask_BS=mask_BS, segment_ids_BS=segment_ids)
    valid_BQ = None if mask_BS is None else mask_BS[:, positions_Q]
    return selected_mass(selected, key, key_roles, visibility, valid_BQ, scale)
