# SPDX-License-Identifier: Apache-2.0
"""Attention mass: how much of each query's attention goes to the keys of each token role.

The full attention matrix is never built. The weights of one chunk of queries over all keys are computed, summed by role
and dropped; the backward pass recomputes them from q and k.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, C = queries of one chunk, H = query heads,
    K = key/value heads, G = query heads of one key head (H / K), D = head size,
    R = token roles (len(TokenRole)), or any other key groups
"""

import torch

from avar_verl.attention.lse_mass import KeysByRole, lse_mass
from avar_verl.attention.visibility import HIDDEN, Visibility
from avar_verl.model.roles import TokenRole

NUM_ROLES = len(TokenRole)
# Elements of one chunk's weights, B * H * C * S: 4 MiB of float32 stay in a CPU's cache, 64 MiB fill a GPU.
CHUNK_ELEMENTS = {"cpu": 2**20, "gpu": 2**24}
IMPLEMENTATIONS = ("auto", "chunked", "lse", "triton")
# Where `auto` takes the log-sum-exp of the model's attention.
AUTO_LSE = ("cpu", "cuda")
# Limits of the Triton kernels.
MAX_GROUPS, MAX_HEAD_SIZE = 16, 512


def _weights(query_BKGCD, key_BKSD, visibility, start, stop, first, last) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over the visible keys, (B, K, G, C, keys up to `last`) float32, for queries that are already scaled.

    A row that sees no key is uniform; alive_BC is False there.
    """
    weights = torch.einsum("bkgcd,bksd->bkgcs", query_BKGCD[:, :, :, start:stop], key_BKSD[:, :, :last])
    visible_BCS = visibility.chunk(start, stop, first, last)
    weights[..., first:].masked_fill_(~visible_BCS[:, None, None], HIDDEN)
    alive_BC = visible_BCS.any(-1) if first == 0 else visible_BCS.new_ones(()).expand(visible_BCS.shape[:2])
    return torch.softmax(weights, dim=-1), alive_BC


def _sum_by_role(weights: torch.Tensor, onehot_BNR: torch.Tensor) -> torch.Tensor:
    """(B, K, G, C, N) weights over N keys to (B, K, G, C, R) sums."""
    B, K, G, C, N = weights.shape
    # The few roles are rows of the product, not columns: this takes a third of the time on a CPU.
    sums_BRM = torch.bmm(onehot_BNR.mT, weights.reshape(B, K * G * C, N).mT)
    return sums_BRM.mT.reshape(B, K, G, C, onehot_BNR.shape[-1])


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
            mass[:, :, :, start:stop] = _sum_by_role(weights, onehot_BSR[:, :last]) * alive_BC[:, None, None, :, None]
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


def takes_lse(implementation: str, device_type: str, num_groups: int, head_size: int) -> bool:
    """Whether a pass without gradients would use the log-sum-exp of the model's attention."""
    can_run = device_type == "cpu" or _can_triton(device_type, num_groups, head_size)
    return can_run and (implementation == "lse" or implementation == "auto" and device_type in AUTO_LSE)


def _can_triton(device_type: str, num_groups: int, head_size: int) -> bool:
    return device_type == "cuda" and 1 <= num_groups <= MAX_GROUPS and head_size <= MAX_HEAD_SIZE


def choose_implementation(
    implementation: str, device_type: str, num_groups: int, head_size: int, has_lse: bool = False
) -> str:
    """Which implementation runs. `auto` takes the first that can run:

    - `lse` on the CPU (attention.lse_mass) or a device that can run `triton` (triton_mass.triton_lse_mass), if the
      log-sum-exp of the model's attention is available, which takes sdpa, and no gradient is needed;
    - `triton` (attention.triton_mass) on a CUDA or ROCm device, for at most MAX_GROUPS groups and heads of at most
      MAX_HEAD_SIZE;
    - `chunked`, PyTorch, everywhere.

    All give the same numbers. If `lse` is requested by name, passes with a gradient use one of the others.

    Args:
        has_lse: the log-sum-exp is available and no gradient is needed.

    Raises:
        ValueError: an unknown name, or `triton` if it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}. Leave it at 'auto'."
        )
    can_triton = _can_triton(device_type, num_groups, head_size)
    if implementation == "triton" and not can_triton:
        raise ValueError(
            f"the Triton kernel needs a CUDA device, at most {MAX_GROUPS} groups and heads of at most {MAX_HEAD_SIZE}; "
            f"got a {device_type} device, {num_groups} groups and heads of {head_size}. Use implementation='auto'."
        )
    if has_lse and takes_lse(implementation, device_type, num_groups, head_size):
        return "lse"
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
    lse_BHQ: torch.Tensor | None = None,
    keys: KeysByRole | None = None,
) -> torch.Tensor:
    """Role masses of selected queries, (B, H, Q, R) float32; 0 where `valid_BQ` is False.

    `attention_mass` is the documented front end; this function takes per-sample query positions, explicit mask rows and
    any grouping of the keys into `num_groups` groups, for example one group per image token. `implementation` is one of
    IMPLEMENTATIONS (`choose_implementation`). `lse_BHQ`, the log-sum-exp of the same queries, and `keys`, the keys of
    the roles that will be read, are for passes without gradients; other columns are then nan.
    """
    if scale is None:
        scale = float(query_BHQD.shape[-1] ** -0.5)
    chosen = choose_implementation(
        implementation, query_BHQD.device.type, num_groups, query_BHQD.shape[-1], lse_BHQ is not None
    )
    with torch.autocast(query_BHQD.device.type, enabled=False):
        if chosen == "triton":
            from avar_verl.attention.triton_mass import triton_mass  # Needs triton, which a CPU may not have.

            mass_BHQR = triton_mass(query_BHQD, key_BKSD, key_roles_BS, visibility, scale, num_groups)
        elif chosen == "lse":
            assert lse_BHQ is not None and keys is not None
            if query_BHQD.device.type == "cpu":
                mass_BHQR = lse_mass(query_BHQD, key_BKSD, lse_BHQ, keys, visibility, scale, num_groups, valid_BQ)
            else:
                from avar_verl.attention.triton_mass import triton_lse_mass

                sizes = (scale, num_groups, lse_BHQ, keys.columns, keys.span_B1)
                mass_BHQR = triton_lse_mass(query_BHQD, key_BKSD, key_roles_BS, visibility, *sizes)
        else:
            onehot_BSR = torch.nn.functional.one_hot(key_roles_BS.long(), num_groups).float()
            mass_BHQR = _ChunkedMass.apply(query_BHQD, key_BKSD, onehot_BSR, visibility, scale)
    return mass_BHQR if valid_BQ is None else mass_BHQR.where(valid_BQ[:, None, :, None], 0.0)


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
        segment_ids: (B, S) integers; a query sees only the keys of its own segment (packed samples). Default: one
            segment.
        query_positions: (Q,) positions in [0, S), the same for every sample. Default: all.
        scale: factor of q . k. Default: D ** -0.5.

    Returns:
        (B, H, Q, R) float32, R = len(TokenRole): in [0, 1], sums to 1 over R on every real query, 0 on a padding query.
        Differentiable in query and key; memory grows with B * H * S, never with S * S.

    Raises:
        ValueError: invalid shapes, roles or positions.

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
        # Otherwise a conversion to int64 would silently turn a mask or fractions into positions.
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
