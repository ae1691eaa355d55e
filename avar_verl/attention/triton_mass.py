# SPDX-License-Identifier: Apache-2.0
"""The attention mass of `mass.py` as Triton kernels: one pass over the keys forward, two passes backward.

The forward kernel runs the online softmax over blocks of keys with one running sum for each group; no value is read and
the sum of a row is the sum of its groups. The backward kernels form the weights again from q, k and one log-sum-exp a
row. All numbers of the softmax are float32, in base 2, where the hardware has its exponential.

A block of queries may share its keys among several programs (splits): few queries alone would leave most of the
device idle. The partial sums are added in PyTorch, so nothing here is atomic and every result is reproducible.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, H = query heads, K = key/value heads,
    G = query heads of one key head (H / K), D = head size, R = key groups, N = splits of the keys, M = key blocks
"""

import contextlib
import math

import torch
import triton
import triton.language as tl

from avar_verl.attention.mass import MAX_GROUPS, MAX_HEAD_SIZE
from avar_verl.attention.visibility import Visibility

LOG2_E = math.log2(math.e)
# Programs that keep the device busy, about 4 for each of the 132 multiprocessors of an H100.
BUSY_PROGRAMS = 512
# Key blocks below which a split costs more to start than it saves.
MIN_BLOCKS_PER_SPLIT = 4


@triton.jit
def _dot(a, b, TYPE: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in float32 from operands of TYPE, or float32 ones; "ieee" keeps TF32 away from the latter."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(TYPE), b.to(TYPE), input_precision="ieee")


@triton.jit
def _load_rows(pointer, start, num_rows, D, stride_row, stride_d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D): the rows from `start` of a (num_rows, D) matrix, 0 beyond its edges."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    # Only the start can be far into the tensor: 64 bits for it, 32 inside the block.
    pointer += tl.cast(start, tl.int64) * stride_row
    mask = (start + row < num_rows)[:, None] & (column < D)[None, :]
    return tl.load(pointer + row[:, None] * stride_row + column[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _store_rows(pointer, tile, start, num_rows, D, stride_row, stride_d, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the part of a (BLOCK, BLOCK_D) tile that lies in a (num_rows, D) matrix."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    pointer += tl.cast(start, tl.int64) * stride_row
    mask = (start + row < num_rows)[:, None] & (column < D)[None, :]
    tl.store(pointer + row[:, None] * stride_row + column[None, :] * stride_d, tile, mask=mask)


@triton.jit
def _visible(
    query,
    key,
    group,
    first,
    last,
    query_segment_ptr,
    key_segment_ptr,
    rows_ptr,
    stride_rq,
    stride_rs,
    Q,
    S,
    R: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Which queries see which keys. The indices come as a row and a column, either way round, and broadcast."""
    visible = (group >= 0) & (group < R) & (key >= first) & (key <= last)
    if HAS_SEGMENTS:
        query_segment = tl.load(query_segment_ptr + query, mask=query < Q, other=0)
        visible = visible & (query_segment == tl.load(key_segment_ptr + key, mask=key < S, other=0))
    if HAS_ROWS:
        # A mask of all queries and keys can pass 2**31 elements.
        seen = rows_ptr + query.to(tl.int64) * stride_rq + key.to(tl.int64) * stride_rs
        visible = visible & (tl.load(seen, mask=(query < Q) & (key < S), other=0) != 0)
    return visible


@triton.jit
def _key_range(first, last, split, num_splits, S, BLOCK_S: tl.constexpr):
    """The keys that one split reads, an equal number of the blocks that some query of the program may see."""
    low = tl.maximum(tl.min(first, 0), 0) // BLOCK_S * BLOCK_S
    high = tl.maximum(tl.minimum(tl.max(last, 0) + 1, S), low)
    step = tl.cdiv(tl.cdiv(high - low, BLOCK_S), num_splits) * BLOCK_S
    begin = low + split * step
    return begin, tl.minimum(begin + step, high)


@triton.jit
def _by_group(pointer, mask, group, R: tl.constexpr):
    """pointer[group] where `pointer` starts R numbers a query and `group` belongs to the keys."""
    value = tl.load(pointer, mask=mask, other=0.0)
    for r in tl.static_range(1, R):
        value = tl.where(group == r, tl.load(pointer + r, mask=mask, other=0.0), value)
    return value


@triton.jit
def _forward_kernel(
    query_ptr,
    key_ptr,
    group_ptr,
    first_ptr,
    last_ptr,
    query_segment_ptr,
    key_segment_ptr,
    rows_ptr,
    sums_ptr,
    maximum_ptr,
    scale_log2,
    H,
    G,
    Q,
    S,
    D,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_rb,
    stride_rq,
    stride_rs,
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """sums_NBHQR and maximum_NBHQ: the sum of 2**(score - maximum) of every group over the keys of a split."""
    start_q = tl.program_id(0) * BLOCK_Q
    split = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b = bh // H
    h = bh % H
    query = start_q + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, BLOCK_R)
    first = tl.load(first_ptr + b * Q + query, mask=query < Q, other=S)
    last = tl.load(last_ptr + b * Q + query, mask=query < Q, other=-1)
    begin, end = _key_range(first, last, split, tl.num_programs(1), S, BLOCK_S)
    q = _load_rows(query_ptr + b * stride_qb + h * stride_qh, start_q, Q, D, stride_qq, stride_qd, BLOCK_Q, BLOCK_D)
    key_ptr += b * stride_kb + (h // G) * stride_kh

    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        group = tl.load(group_ptr + b * S + key, mask=key < S, other=-1)
        k = _load_rows(key_ptr, start, S, D, stride_ks, stride_kd, BLOCK_S, BLOCK_D)
        score = _dot(q, tl.trans(k), TYPE, WIDEN) * scale_log2
        visible = _visible(
            query[:, None],
            key[None, :],
            group[None, :],
            first[:, None],
            last[:, None],
            query_segment_ptr + b * Q,
            key_segment_ptr + b * S,
            rows_ptr + b * stride_rb,
            stride_rq,
            stride_rs,
            Q,
            S,
            R,
            HAS_SEGMENTS,
            HAS_ROWS,
        )
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        # While a query has seen nothing its maximum is -inf, and -inf - -inf would be nan.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        sums *= tl.exp2(maximum - base)[:, None]
        for r in tl.static_range(R):
            part = tl.sum(tl.where((group == r)[None, :], weight, 0.0), 1)
            sums += tl.where((column == r)[None, :], part[:, None], 0.0)
        maximum = higher

    out = (split * tl.num_programs(2) + bh) * Q
    tl.store(maximum_ptr + out + query, maximum, mask=query < Q)
    _store_rows(sums_ptr + out * R, sums, start_q, Q, R, R, 1, BLOCK_Q, BLOCK_R)


@triton.jit
def _grad_query_kernel(
    query_ptr,
    key_ptr,
    group_ptr,
    first_ptr,
    last_ptr,
    query_segment_ptr,
    key_segment_ptr,
    rows_ptr,
    lse_ptr,
    bracket_ptr,
    grad_ptr,
    scale,
    scale_log2,
    H,
    G,
    Q,
    S,
    D,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_rb,
    stride_rq,
    stride_rs,
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """grad_NBHQD: scale * sum over the keys of a split of p_k bracket_{group_k} k."""
    start_q = tl.program_id(0) * BLOCK_Q
    split = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b = bh // H
    h = bh % H
    query = start_q + tl.arange(0, BLOCK_Q)
    first = tl.load(first_ptr + b * Q + query, mask=query < Q, other=S)
    last = tl.load(last_ptr + b * Q + query, mask=query < Q, other=-1)
    lse = tl.load(lse_ptr + bh * Q + query, mask=query < Q, other=0.0)
    begin, end = _key_range(first, last, split, tl.num_programs(1), S, BLOCK_S)
    q = _load_rows(query_ptr + b * stride_qb + h * stride_qh, start_q, Q, D, stride_qq, stride_qd, BLOCK_Q, BLOCK_D)
    key_ptr += b * stride_kb + (h // G) * stride_kh

    grad = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        group = tl.load(group_ptr + b * S + key, mask=key < S, other=-1)
        k = _load_rows(key_ptr, start, S, D, stride_ks, stride_kd, BLOCK_S, BLOCK_D)
        score = _dot(q, tl.trans(k), TYPE, WIDEN) * scale_log2
        visible = _visible(
            query[:, None],
            key[None, :],
            group[None, :],
            first[:, None],
            last[:, None],
            query_segment_ptr + b * Q,
            key_segment_ptr + b * S,
            rows_ptr + b * stride_rb,
            stride_rq,
            stride_rs,
            Q,
            S,
            R,
            HAS_SEGMENTS,
            HAS_ROWS,
        )
        bracket = _by_group(bracket_ptr + (bh * Q + query[:, None]) * R, (query < Q)[:, None], group[None, :], R)
        # A weight is at most 1; huge scores, added up in another order than in the forward pass, may say otherwise.
        weight = tl.exp2(tl.minimum(score - lse[:, None], 0.0))
        grad += _dot(tl.where(visible, weight * bracket, 0.0), k, GRAD_TYPE, WIDEN)

    grad_ptr += (split * tl.num_programs(2) + bh) * Q * D
    _store_rows(grad_ptr, grad * scale, start_q, Q, D, D, 1, BLOCK_Q, BLOCK_D)


@triton.jit
def _grad_key_kernel(
    query_ptr,
    key_ptr,
    group_ptr,
    first_ptr,
    last_ptr,
    query_segment_ptr,
    key_segment_ptr,
    rows_ptr,
    lse_ptr,
    bracket_ptr,
    begin_ptr,
    end_ptr,
    grad_ptr,
    scale,
    scale_log2,
    H,
    G,
    Q,
    S,
    D,
    stride_qb,
    stride_qh,
    stride_qq,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_rb,
    stride_rq,
    stride_rs,
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """grad_BKSD: scale * sum over the G heads and the queries of p_k bracket_{group_k} q; keys run down the tiles."""
    block = tl.program_id(0)
    start_s = block * BLOCK_S
    bk = tl.program_id(1).to(tl.int64)
    K = H // G
    b = bk // K
    key_head = bk % K
    key = start_s + tl.arange(0, BLOCK_S)
    group = tl.load(group_ptr + b * S + key, mask=key < S, other=-1)
    k = _load_rows(
        key_ptr + b * stride_kb + key_head * stride_kh, start_s, S, D, stride_ks, stride_kd, BLOCK_S, BLOCK_D
    )
    begin = tl.load(begin_ptr + b * tl.num_programs(0) + block)
    count = tl.maximum(tl.load(end_ptr + b * tl.num_programs(0) + block) - begin, 0)

    grad = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    # One loop over heads and query blocks: with few queries an inner loop would be too short to overlap its loads.
    for i in range(0, G * count):
        h = key_head * G + i // count
        start_q = (begin + i % count) * BLOCK_Q
        query = start_q + tl.arange(0, BLOCK_Q)
        row = (b * H + h) * Q + query
        first = tl.load(first_ptr + b * Q + query, mask=query < Q, other=S)
        last = tl.load(last_ptr + b * Q + query, mask=query < Q, other=-1)
        lse = tl.load(lse_ptr + row, mask=query < Q, other=0.0)
        q = _load_rows(query_ptr + b * stride_qb + h * stride_qh, start_q, Q, D, stride_qq, stride_qd, BLOCK_Q, BLOCK_D)
        score = _dot(k, tl.trans(q), TYPE, WIDEN) * scale_log2
        visible = _visible(
            query[None, :],
            key[:, None],
            group[:, None],
            first[None, :],
            last[None, :],
            query_segment_ptr + b * Q,
            key_segment_ptr + b * S,
            rows_ptr + b * stride_rb,
            stride_rq,
            stride_rs,
            Q,
            S,
            R,
            HAS_SEGMENTS,
            HAS_ROWS,
        )
        bracket = _by_group(bracket_ptr + row[None, :] * R, (query < Q)[None, :], group[:, None], R)
        weight = tl.exp2(tl.minimum(score - lse[None, :], 0.0))  # See _grad_query_kernel.
        grad += _dot(tl.where(visible, weight * bracket, 0.0), q, GRAD_TYPE, WIDEN)

    grad_ptr += bk * S * D
    _store_rows(grad_ptr, grad * scale, start_s, S, D, D, 1, BLOCK_S, BLOCK_D)


# Chosen by TRITON_INTERPRET when the kernels above were decorated.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def _block_sizes(head_size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(queries of a block, keys of a block, warps).

    64 rows fill the tensor cores of one warp group. float32 is multiplied without tensor cores, in smaller blocks. Four
    warps hold the tiles of bfloat16 up to a head size of 128; larger heads, and the float32 operands that the backward
    pass makes of float16, would spill their registers.
    """
    if dtype == torch.float32:
        return 32, 32, 8
    return 64, 64, 4 if dtype == torch.bfloat16 and head_size <= 128 else 8


def _num_splits(num_programs: int, num_keys: int, block_s: int) -> int:
    """How many programs share the keys of a query block: enough to fill the device, none with too little to do."""
    wanted = triton.cdiv(BUSY_PROGRAMS, max(1, num_programs))
    return max(1, min(wanted, num_keys // (MIN_BLOCKS_PER_SPLIT * block_s)))


def _key_bounds(visibility: Visibility, B: int, Q: int, S: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Q) int32 each: no key before the first or after the last is visible to the query."""
    if visibility.rows_BQS is not None:
        first_BQ = torch.zeros(B, Q, dtype=torch.int32, device=device)
        return first_BQ, torch.full_like(first_BQ, S - 1)
    last_BQ = visibility.positions_BQ.long()
    first_BQ = torch.zeros_like(last_BQ)
    if visibility.window is not None:
        first_BQ = (last_BQ - visibility.window + 1).clamp(min=0)
    if visibility.key_mask_BS is not None:
        # argmax is the first real key: left padding is skipped. It is 0 when there is none.
        first_BQ = torch.maximum(first_BQ, visibility.key_mask_BS.int().argmax(1, keepdim=True))
    if visibility.segment_ids_BS is not None:
        # A stable sort puts the first key of every segment at the start of its run, whatever the ids and their order.
        sorted_BS, order_BS = visibility.segment_ids_BS.sort(dim=1, stable=True)
        start_BS = torch.arange(S, device=device).expand(B, S).clone()
        start_BS[:, 1:][sorted_BS[:, 1:] == sorted_BS[:, :-1]] = 0
        segment_first_BS = torch.empty_like(order_BS)
        segment_first_BS.scatter_(1, order_BS, order_BS.gather(1, start_BS.cummax(1).values))
        first_BQ = torch.maximum(first_BQ, segment_first_BS.gather(1, last_BQ))
    return first_BQ.int().contiguous(), last_BQ.int().contiguous()


def _query_ranges(first_BQ, last_BQ, S: int, block_q: int, block_s: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, M) int32 each: the query blocks, begin to end, outside of which no query sees the key block.

    Positions may come in any order, so a block inside the range may see nothing; ascending positions waste none.
    """
    B, Q = first_BQ.shape
    padding = (0, -Q % block_q)
    last = torch.nn.functional.pad(last_BQ, padding, value=-1).view(B, -1, block_q).amax(-1)
    first = torch.nn.functional.pad(first_BQ, padding, value=S).view(B, -1, block_q).amin(-1)
    edge_BM = torch.arange(0, S, block_s, dtype=torch.int32, device=first.device).expand(B, -1).contiguous()
    # The greatest position so far and the least first key from here on both ascend, which a binary search needs.
    begin_BM = torch.searchsorted(last.cummax(1).values, edge_BM)
    end_BM = torch.searchsorted(first.flip(1).cummin(1).values.flip(1), edge_BM + (block_s - 1), right=True)
    return begin_BM.int(), end_BM.int()


def _device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class _TritonMass(torch.autograd.Function):
    """The kernels behind `triton_mass`; between the passes it keeps q, k, the masses and one log-sum-exp a row."""

    @staticmethod
    def forward(ctx, query_BHQD, key_BKSD, groups_BS, visibility, scale, num_groups):
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        first_BQ, last_BQ = _key_bounds(visibility, B, Q, S, query_BHQD.device)
        groups_BS = groups_BS.int().contiguous()
        # A kernel does not touch the pointers of what is absent, but wants some tensor there.
        key_segment_BS = query_segment_BQ = rows_BQS = groups_BS
        row_strides = (0, 0, 0)
        has_rows = visibility.rows_BQS is not None
        has_segments = not has_rows and visibility.segment_ids_BS is not None
        if has_rows:
            rows_BQS = visibility.rows_BQS.view(torch.uint8)  # The same bytes, in a type with arithmetic.
            row_strides = rows_BQS.stride()
        elif visibility.key_mask_BS is not None:
            groups_BS = groups_BS.masked_fill(~visibility.key_mask_BS.bool(), -1)  # No group: hidden from every query.
        if has_segments:
            key_segment_BS = visibility.segment_ids_BS.contiguous()
            query_segment_BQ = key_segment_BS.gather(1, visibility.positions_BQ.long())

        dtype = query_BHQD.dtype if query_BHQD.dtype == key_BKSD.dtype else torch.float32
        operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
        block_q, block_s, num_warps = _block_sizes(D, torch.float32 if operand == tl.float32 else dtype)
        ctx.num_splits = _num_splits(B * H * triton.cdiv(Q, block_q), S, block_s)
        ctx.sizes = (H, H // K, Q, S, D, *query_BHQD.stride(), *key_BKSD.stride(), *row_strides)
        ctx.scale = scale
        ctx.options = dict(
            R=num_groups,
            BLOCK_Q=block_q,
            BLOCK_S=block_s,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            TYPE=operand,
            # The interpreter's dot multiplies the raw bits of bfloat16, and its rounding to bfloat16 truncates.
            WIDEN=INTERPRETED,
            HAS_SEGMENTS=has_segments,
            HAS_ROWS=has_rows,
            num_warps=num_warps,
        )
        inputs = (query_BHQD, key_BKSD, groups_BS, first_BQ, last_BQ, query_segment_BQ, key_segment_BS, rows_BQS)
        sums_NBHQR = query_BHQD.new_zeros((ctx.num_splits, B, H, Q, num_groups), dtype=torch.float32)
        maximum_NBHQ = torch.full_like(sums_NBHQR[..., 0], float("-inf"))
        if query_BHQD.numel() and key_BKSD.numel():
            grid = (triton.cdiv(Q, block_q), ctx.num_splits, B * H)
            block_r = triton.next_power_of_2(num_groups)
            with _device_of(query_BHQD):
                _forward_kernel[grid](
                    *inputs, sums_NBHQR, maximum_NBHQ, scale * LOG2_E, *ctx.sizes, **ctx.options, BLOCK_R=block_r
                )
        # The splits on a common maximum; a split that saw nothing has -inf, and so does a row that no split saw.
        base_BHQ = maximum_NBHQ.amax(0)
        base_BHQ = base_BHQ.masked_fill(base_BHQ == float("-inf"), 0.0)
        sums_BHQR = (sums_NBHQR * torch.exp2(maximum_NBHQ - base_BHQ)[..., None]).sum(0)
        total_BHQ = sums_BHQR.sum(-1)
        mass_BHQR = sums_BHQR / total_BHQ.masked_fill(total_BHQ == 0, 1.0)[..., None]
        lse_BHQ = base_BHQ + total_BHQ.log2()  # In base 2. The -inf of a row without keys is never read.
        ctx.save_for_backward(*inputs, mass_BHQR, lse_BHQ)
        return mass_BHQR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BHQR):
        *inputs, mass_BHQR, lse_BHQ = ctx.saved_tensors
        query_BHQD, key_BKSD, _, first_BQ, last_BQ = inputs[:5]
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        grad_BHQR = grad_BHQR.float()
        bracket_BHQR = (grad_BHQR - (grad_BHQR * mass_BHQR).sum(-1, keepdim=True)).contiguous()
        block_q, block_s = ctx.options["BLOCK_Q"], ctx.options["BLOCK_S"]
        # Gradients of a mass can lie below the range of float16, unlike its queries and keys.
        grad_type = tl.float32 if ctx.options["TYPE"] == tl.float16 else ctx.options["TYPE"]
        arguments = (ctx.scale, ctx.scale * LOG2_E, *ctx.sizes)
        options = dict(ctx.options, GRAD_TYPE=grad_type)
        empty = not (query_BHQD.numel() and key_BKSD.numel())
        grad_query_BHQD = grad_key_BKSD = None
        if ctx.needs_input_grad[0]:
            partial_NBHQD = query_BHQD.new_zeros((ctx.num_splits, B, H, Q, D), dtype=torch.float32)
            if not empty:
                grid = (triton.cdiv(Q, block_q), ctx.num_splits, B * H)
                with _device_of(query_BHQD):
                    _grad_query_kernel[grid](*inputs, lse_BHQ, bracket_BHQR, partial_NBHQD, *arguments, **options)
            grad_query_BHQD = partial_NBHQD.sum(0).to(query_BHQD.dtype)
        if ctx.needs_input_grad[1]:
            grad_key_BKSD = key_BKSD.new_zeros((B, K, S, D), dtype=torch.float32)
            if not empty:
                ranges = _query_ranges(first_BQ, last_BQ, S, block_q, block_s)
                grid = (triton.cdiv(S, block_s), B * K)
                with _device_of(query_BHQD):
                    _grad_key_kernel[grid](
                        *inputs, lse_BHQ, bracket_BHQR, *ranges, grad_key_BKSD, *arguments, **options
                    )
            grad_key_BKSD = grad_key_BKSD.to(key_BKSD.dtype)
        return grad_query_BHQD, grad_key_BKSD, None, None, None, None


def triton_mass(
    query_BHQD: torch.Tensor,
    key_BKSD: torch.Tensor,
    groups_BS: torch.Tensor,
    visibility: Visibility,
    scale: float,
    num_groups: int,
) -> torch.Tensor:
    """mass[b, h, q, r] = sum over the visible keys k of group r of softmax_k(scale * query_q . key_k).

    The fused form of `selected_mass`: the same numbers, with no tensor of the size Q * S.

    Args:
        query_BHQD: (B, H, Q, D) bfloat16, float16 or float32, any strides, after the rotary embedding.
        key_BKSD: (B, K, S, D), any strides; K divides H and query head h reads key head h // (H / K).
        groups_BS: (B, S) integers in [0, num_groups); a key of any other group is hidden from every query.
        visibility: which keys each query sees. Positions in any order; ascending ones skip the most work.
        scale: factor of q . k.
        num_groups: R, 1 to 16.

    Returns:
        (B, H, Q, R) float32: sums to 1 over R; 0, with gradient 0, where a query sees no key. Differentiable in query
        and key, each gradient in the type of its input. Products are float32 (never TF32) for float32 inputs; with
        bfloat16 the backward pass rounds d loss / d score to bfloat16.

    Raises:
        ValueError: shapes that do not fit, a head size above 256, or a number of groups that is not 1 to 16.

    >>> q, k = torch.zeros(1, 1, 1, 16, device="cuda"), torch.zeros(1, 1, 4, 16, device="cuda")
    >>> groups = torch.tensor([[0, 1, 1, 1]], device="cuda")
    >>> triton_mass(q, k, groups, Visibility(torch.tensor([[3]], device="cuda")), scale=1.0, num_groups=2).tolist()
    [[[[0.25, 0.75]]]]
    """
    if not 1 <= num_groups <= MAX_GROUPS:
        raise ValueError(
            f"num_groups must be 1 to {MAX_GROUPS}; got {num_groups}. Merge groups or use `selected_mass`, which takes "
            "any number."
        )
    query_shape, key_shape = tuple(query_BHQD.shape), tuple(key_BKSD.shape)
    if len(query_shape) != 4 or len(key_shape) != 4 or query_shape[::3] != key_shape[::3]:
        raise ValueError(
            "query must be (B, H, Q, D) and key (B, K, S, D) over the same samples and head size; got "
            f"{query_shape} and {key_shape}. Pass the tensors as they enter the attention."
        )
    (B, H, Q, D), (_, K, S, _) = query_shape, key_shape
    if K == 0 or H % K:
        raise ValueError(
            f"the number of key heads must divide the number of query heads; got {K} and {H}. "
            "Do not repeat or drop heads before the call."
        )
    if D > MAX_HEAD_SIZE:
        raise ValueError(
            f"the head size must be at most {MAX_HEAD_SIZE}; got {D}. Use `selected_mass`, which takes any size."
        )
    for name, tensor, shape in [
        ("groups_BS", groups_BS, (B, S)),
        ("visibility.positions_BQ", visibility.positions_BQ, (B, Q)),
        ("visibility.key_mask_BS", visibility.key_mask_BS, (B, S)),
        ("visibility.segment_ids_BS", visibility.segment_ids_BS, (B, S)),
        ("visibility.rows_BQS", visibility.rows_BQS, (B, Q, S)),
    ]:
        # A kernel would read beyond the end of a tensor that is too small.
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have the shape {shape}; got {tuple(tensor.shape)}. Expand what is common to the samples."
            )
    return _TritonMass.apply(query_BHQD, key_BKSD, groups_BS, visibility, scale, num_groups)
