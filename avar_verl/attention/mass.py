# SPDX-License-Identifier: Apache-2.0
"""Attention mass: how much of each query's attention goes to the keys of each token role.

The full attention matrix is never formed. A chunk of queries meets all keys, the weights are summed by role, and the
chunk is dropped; the backward pass forms the chunk's weights again from q, k and two numbers a row.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, C = queries of one chunk, H = query heads,
    K = key/value heads, G = query heads of one key head (H / K), D = head size,
    R = token roles (len(TokenRole)), or any other key groups
"""

from dataclasses import dataclass

import torch

from avar_verl.roles import TokenRole

NUM_ROLES = len(TokenRole)
# Elements of one chunk's weights, B * H * C * S: 2**24 floats are 64 MiB.
CHUNK_ELEMENTS = 2**24


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

    def chunk(self, start: int, stop: int, num_keys: int) -> torch.Tensor:
        """(B, C, S) bool of the queries start..stop."""
        if self.rows_BQS is not None:
            return self.rows_BQS[:, start:stop]
        positions_BC1 = self.positions_BQ[:, start:stop, None]
        keys_S = torch.arange(num_keys, device=positions_BC1.device)
        visible_BCS = keys_S <= positions_BC1
        if self.window is not None:
            visible_BCS = visible_BCS & (keys_S > positions_BC1 - self.window)
        if self.key_mask_BS is not None:
            visible_BCS = visible_BCS & self.key_mask_BS[:, None, :]
        if self.segment_ids_BS is not None:
            segment_BC = self.segment_ids_BS.gather(1, self.positions_BQ[:, start:stop])
            visible_BCS = visible_BCS & (segment_BC[:, :, None] == self.segment_ids_BS[:, None, :])
        return visible_BCS


def _chunk_weights(query_BKGCD, key_BKSD, visible_BCS, scale) -> torch.Tensor:
    """softmax over the visible keys, (B, K, G, C, S) float32; a row that sees nothing is 0."""
    scores = torch.einsum("bkgcd,bksd->bkgcs", query_BKGCD, key_BKSD).mul_(scale)
    hidden = ~visible_BCS[:, None, None]
    weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
    return weights.masked_fill_(hidden, 0.0)  # Also turns the nan of a row that sees nothing into 0.


class _RoleMass(torch.autograd.Function):
    """mass_r = sum_k p_k [role_k = r] with p = softmax(scale * q . k).

    Backward: d loss / d score_k = p_k (g_{role_k} - sum_r g_r mass_r), with g = d loss / d mass. Only q, k and mass are
    kept between the passes.
    """

    @staticmethod
    def forward(ctx, query_BHQD, key_BKSD, onehot_BSR, visibility, scale):
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        ctx.chunk = max(1, CHUNK_ELEMENTS // max(1, B * H * S))
        ctx.visibility, ctx.scale = visibility, scale
        query = query_BHQD.float().reshape(B, K, H // K, Q, D)
        key = key_BKSD.float()
        mass = query.new_zeros(B, K, H // K, Q, onehot_BSR.shape[-1])
        for start in range(0, Q, ctx.chunk):
            stop = min(start + ctx.chunk, Q)
            weights = _chunk_weights(query[:, :, :, start:stop], key, visibility.chunk(start, stop, S), scale)
            torch.matmul(weights, onehot_BSR[:, None, None], out=mass[:, :, :, start:stop])
        ctx.save_for_backward(query_BHQD, key_BKSD, onehot_BSR, mass)
        return mass.reshape(B, H, Q, mass.shape[-1])  # Q may be 0, which forbids -1.

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHQR):
        query_BHQD, key_BKSD, onehot_BSR, mass = ctx.saved_tensors
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        query = query_BHQD.float().reshape(B, K, H // K, Q, D)
        key = key_BKSD.float()
        grad = grad_BHQR.float().reshape(mass.shape)
        # g_r - sum_r' g_r' mass_r', the bracket of the formula above for every role.
        grad = grad - (grad * mass).sum(-1, keepdim=True)
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        for start in range(0, Q, ctx.chunk):
            stop = min(start + ctx.chunk, Q)
            chunk = query[:, :, :, start:stop]
            grad_scores = _chunk_weights(chunk, key, ctx.visibility.chunk(start, stop, S), ctx.scale)
            grad_scores.mul_(torch.matmul(grad[:, :, :, start:stop], onehot_BSR[:, None, None].mT)).mul_(ctx.scale)
            grad_query[:, :, :, start:stop] = torch.einsum("bkgcs,bksd->bkgcd", grad_scores, key)
            grad_key += torch.einsum("bkgcs,bkgcd->bksd", grad_scores, chunk)
        return grad_query.reshape(B, H, Q, D).to(query_BHQD.dtype), grad_key.to(key_BKSD.dtype), None, None, None


def selected_mass(
    query_BHQD: torch.Tensor,
    key_BKSD: torch.Tensor,
    key_roles_BS: torch.Tensor,
    visibility: Visibility,
    valid_BQ: torch.Tensor | None = None,
    scale: float | None = None,
    num_groups: int = NUM_ROLES,
) -> torch.Tensor:
    """Role masses of already selected queries, (B, H, Q, R) float32; 0 where `valid_BQ` is False.

    `attention_mass` is the documented front end; this one takes per-sample query positions, explicit mask rows and any
    grouping of the keys into `num_groups` groups, for example one group for every image token.
    """
    onehot_BSR = torch.nn.functional.one_hot(key_roles_BS.long(), num_groups).float()
    scale = query_BHQD.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query_BHQD.device.type, enabled=False):
        mass_BHQR = _RoleMass.apply(query_BHQD, key_BKSD, onehot_BSR, visibility, scale)
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
