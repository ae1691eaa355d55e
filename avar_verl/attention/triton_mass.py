# SPDX-License-Identifier: Apache-2.0
"""The attention mass of `mass.py` as Triton kernels: one pass over the keys forward, two passes backward.

The forward kernel runs the online softmax over blocks of keys with one running sum for each group; no value is read and
the sum of a row is the sum of its groups. The backward kernels form the weights again from q, k and one log-sum-exp a
row. All numbers of the softmax are float32, in base 2, where the hardware has its exponential. If the log-sum-exp of
the model's own attention is there and no gradient is needed, a fourth kernel reads the keys of the wanted groups only,
without maxima and sums of the other keys.

A block of queries may share its keys among several programs (splits): otherwise few queries would leave most of the
device idle. The partial sums are added in PyTorch, so nothing here is atomic and every result is reproducible.

Shape suffixes:
    B = samples, S = key positions, Q = selected queries, H = query heads, K = key/value heads,
    G = query heads of one key head (H / K), D = head size, R = key groups, N = splits of the keys, M = key blocks,
    W = words of 32 keys
"""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

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
    start_s,
    query_segment_ptr,
    key_segment_ptr,
    rows_ptr,
    stride_rq,
    Q,
    S,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """Which queries see which keys. The indices come as a row and a column, either way round, and broadcast."""
    visible = (group >= 0) & (group < R) & (key >= first) & (key <= last)
    if HAS_SEGMENTS:
        query_segment = tl.load(query_segment_ptr + query, mask=query < Q, other=0)
        visible = visible & (query_segment == tl.load(key_segment_ptr + key, mask=key < S, other=0))
    if HAS_ROWS:
        # A tile of bytes has another layout than the scores, and converting it would spill registers; a word has none.
        rows_ptr += query.to(tl.int64) * stride_rq + start_s // 32
        word = tl.load(rows_ptr, mask=query < Q, other=0)
        for i in tl.static_range(1, BLOCK_S // 32):
            next_word = tl.load(rows_ptr + i, mask=(query < Q) & (start_s + i * 32 < S), other=0)
            word = tl.where(key - start_s < i * 32, word, next_word)
        visible = visible & ((word >> (key & 31)) & 1 != 0)
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

    # Between these two keys every query of the block sees everything (rows beyond Q are never stored).
    all_from = tl.max(tl.load(first_ptr + b * Q + query, mask=query < Q, other=0), 0)
    all_to = tl.min(tl.load(last_ptr + b * Q + query, mask=query < Q, other=S), 0)

    maximum = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        group = tl.load(group_ptr + b * S + key, mask=key < S, other=-1)
        least, greatest = tl.min(group, 0), tl.max(group, 0)
        k = _load_rows(key_ptr, start, S, D, stride_ks, stride_kd, BLOCK_S, BLOCK_D)
        score = _dot(q, tl.trans(k), TYPE, WIDEN) * scale_log2
        is_partial = (start < all_from) | (start + BLOCK_S - 1 > all_to) | (least < 0) | (greatest >= R)
        if is_partial | (HAS_SEGMENTS or HAS_ROWS):
            visible = _visible(
                query[:, None],
                key[None, :],
                group[None, :],
                first[:, None],
                last[:, None],
                start,
                query_segment_ptr + b * Q,
                key_segment_ptr + b * S,
                rows_ptr + b * stride_rb,
                stride_rq,
                Q,
                S,
                R,
                BLOCK_S,
                HAS_SEGMENTS,
                HAS_ROWS,
            )
            score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        # While a query has seen nothing its maximum is -inf, and -inf - -inf would be nan.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        sums *= tl.exp2(maximum - base)[:, None]
        if least == greatest:  # Most blocks: roles come in runs that are longer than a block.
            sums += tl.where((column == greatest)[None, :], tl.sum(weight, 1)[:, None], 0.0)
        else:
            for r in tl.static_range(R):
                part = tl.sum(tl.where((group == r)[None, :], weight, 0.0), 1)
                sums += tl.where((column == r)[None, :], part[:, None], 0.0)
        maximum = higher

    out = (split * tl.num_programs(2) + bh) * Q
    tl.store(maximum_ptr + out + query, maximum, mask=query < Q)
    _store_rows(sums_ptr + out * R, sums, start_q, Q, R, R, 1, BLOCK_Q, BLOCK_R)


@triton.jit
def _lse_kernel(
    query_ptr,
    key_ptr,
    group_ptr,
    first_ptr,
    last_ptr,
    query_segment_ptr,
    key_segment_ptr,
    rows_ptr,
    lse_ptr,
    mass_ptr,
    scale_log2,
    log2_e,
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
    R: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TYPE: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    """mass_NBHQR of the groups in the bits of WANTED: the sum of exp(score - lse) over their keys of a split."""
    start_q = tl.program_id(0) * BLOCK_Q
    split = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    b = bh // H
    h = bh % H
    query = start_q + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, BLOCK_R)
    first = tl.load(first_ptr + b * Q + query, mask=query < Q, other=S)
    last = tl.load(last_ptr + b * Q + query, mask=query < Q, other=-1)
    # A query that sees no key may have -inf, from which nothing can be subtracted.
    lse = tl.load(lse_ptr + bh * Q + query, mask=query < Q, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * log2_e
    begin, end = _key_range(first, last, split, tl.num_programs(1), S, BLOCK_S)
    q = _load_rows(query_ptr + b * stride_qb + h * stride_qh, start_q, Q, D, stride_qq, stride_qd, BLOCK_Q, BLOCK_D)
    key_ptr += b * stride_kb + (h // G) * stride_kh

    # Between these two keys every query of the block sees everything (rows beyond Q are never stored).
    all_from = tl.max(tl.load(first_ptr + b * Q + query, mask=query < Q, other=0), 0)
    all_to = tl.min(tl.load(last_ptr + b * Q + query, mask=query < Q, other=S), 0)

    mass = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        group = tl.load(group_ptr + b * S + key, mask=key < S, other=-1)
        least, greatest = tl.min(group, 0), tl.max(group, 0)
        k = _load_rows(key_ptr, start, S, D, stride_ks, stride_kd, BLOCK_S, BLOCK_D)
        weight = tl.exp2(_dot(q, tl.trans(k), TYPE, WIDEN) * scale_log2 - lse[:, None])
        is_partial = (start < all_from) | (start + BLOCK_S - 1 > all_to) | (least < 0) | (greatest >= R)
        if is_partial | (HAS_SEGMENTS or HAS_ROWS):
            visible = _visible(
                query[:, None],
                key[None, :],
                group[None, :],
                first[:, None],
                last[:, None],
                start,
                query_segment_ptr + b * Q,
                key_segment_ptr + b * S,
                rows_ptr + b * stride_rb,
                stride_rq,
                Q,
                S,
                R,
                BLOCK_S,
                HAS_SEGMENTS,
                HAS_ROWS,
            )
            weight = tl.where(visible, weight, 0.0)
        if least == greatest:  # Most blocks: roles come in runs that are longer than a block.
            mass += tl.where((column == greatest)[None, :], tl.sum(weight, 1)[:, None], 0.0)
        else:
            for r in tl.static_range(R):
                if (WANTED >> r) & 1:
                    part = tl.sum(tl.where((group == r)[None, :], weight, 0.0), 1)
                    mass += tl.where((column == r)[None, :], part[:, None], 0.0)

    out = (split * tl.num_programs(2) + bh) * Q
    is_wanted = (column < R) & ((WANTED >> column) & 1 != 0)
    mass_ptr += out * R
    offset = query[:, None].to(tl.int64) * R + column[None, :]
    tl.store(mass_ptr + offset, mass, mask=(query < Q)[:, None] & is_wanted[None, :])


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
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
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
            start,
            query_segment_ptr + b * Q,
            key_segment_ptr + b * S,
            rows_ptr + b * stride_rb,
            stride_rq,
            Q,
            S,
            R,
            BLOCK_S,
            HAS_SEGMENTS,
            HAS_ROWS,
        )
        bracket = _by_group(bracket_ptr + (bh * Q + query[:, None]) * R, (query < Q)[:, None], group[None, :], R)
        # A weight is at most 1; huge scores, added up in another order than in the forward pass, may say otherwise.
        weight = tl.exp2(tl.minimum(score - lse[:, None], 0.0))
        grad += _dot(tl.where(visible, weight * bracket, 0.0), k, TYPE, WIDEN)

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
    R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr,
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
            start_s,
            query_segment_ptr + b * Q,
            key_segment_ptr + b * S,
            rows_ptr + b * stride_rb,
            stride_rq,
            Q,
            S,
            R,
            BLOCK_S,
            HAS_SEGMENTS,
            HAS_ROWS,
        )
        bracket = _by_group(bracket_ptr + row[None, :] * R, (query < Q)[None, :], group[:, None], R)
        weight = tl.exp2(tl.minimum(score - lse[None, :], 0.0))  # See _grad_query_kernel.
        grad += _dot(tl.where(visible, weight * bracket, 0.0), q, TYPE, WIDEN)

    grad_ptr += bk * S * D
    _store_rows(grad_ptr, grad * scale, start_s, S, D, D, 1, BLOCK_S, BLOCK_D)


# Chosen by TRITON_INTERPRET when the kernels above were decorated.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


class Blocks(NamedTuple):
    """How one kernel is cut and compiled: queries and keys (a multiple of 32) of a block, warps, loads that overlap."""

    block_q: int
    block_s: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return dict(BLOCK_Q=self.block_q, BLOCK_S=self.block_s, num_warps=self.num_warps, num_stages=self.num_stages)


KERNELS = ("forward", "lse", "grad_query", "grad_key")
# {name in KERNELS: blocks} in place of those of `_block_sizes`, for a benchmark that compares them.
CHOICES: dict[str, Blocks] = {}


def _block_sizes(kernel: str, head_size: int, dtype: torch.dtype, architecture: int) -> Blocks:
    """Blocks that need no local memory, nor more shared memory than the 99 KiB of the small devices (sm_86 and 89).

    The tensor cores of Hopper and Blackwell take 64 rows at once: keys in the kernel of their gradient, else queries.
    A gradient leaves room for a short other side only. Elsewhere its rows are the short side, and the weights of many
    columns are spread over the warps. float32 is multiplied without tensor cores, in small blocks.

    `architecture` is that of `_architecture`. tests/attention/test_triton_compiled.py compiles the choices.
    """
    small = head_size <= 128
    if architecture == 0:  # AMD keeps in registers what is loaded ahead.
        if dtype == torch.float32:
            return Blocks(32 if head_size <= 256 else 16, 32, 4, 1)
        if kernel == "grad_key":
            return Blocks(32, 64 if head_size <= 256 else 32, 4, 1)
        return Blocks(64, 32, 4, 2)
    if dtype == torch.float32:
        if not small:
            return Blocks(32 if head_size <= 256 else 16, 32, 8, 2)
        return Blocks(32, 32, 8 if kernel in ("forward", "lse") else 4, 3)
    if head_size > 256:
        return Blocks(32, 32, 8, 2)
    if kernel == "lse" and small and architecture // 10 == 9:
        return Blocks(128, 32, 8, 2)  # The fastest of 15 on an H200, with 2048 queries.
    if kernel == "lse":
        kernel = "forward"
    if kernel == "forward" and small and architecture // 10 == 9:
        return Blocks(64, 64, 4, 2)  # The fastest of 14 on an H200, with 64 and with 2048 queries.
    if kernel == "forward":
        return Blocks(64, 64 if small else 32, 8, 3)
    if (kernel == "grad_query") == (architecture // 10 in (9, 10)):
        return Blocks(64, 32, 4 if small else 8, 3)
    return Blocks(32, 64, 4 if small else 8, 3)


def _num_splits(num_programs: int, num_keys: int, block_s: int) -> int:
    """How many programs share the keys of a query block: enough to fill the device, none with too little to do."""
    wanted = triton.cdiv(BUSY_PROGRAMS, max(1, num_programs))
    return max(1, min(wanted, num_keys // (MIN_BLOCKS_PER_SPLIT * block_s)))


def _query_grid(blocks: Blocks, num_heads: int, num_queries: int, num_keys: int) -> tuple[int, int, int]:
    """(query blocks, splits, heads of all samples): the programs of a kernel whose blocks of queries share the keys."""
    num_blocks = triton.cdiv(num_queries, blocks.block_q)
    return num_blocks, _num_splits(num_heads * num_blocks, num_keys, blocks.block_s), num_heads


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


def _pack_rows(rows_BQS: torch.Tensor) -> torch.Tensor:
    """(B, Q, W) int32: bit s % 32 of word s // 32 is rows_BQS[b, q, s]."""
    B, Q, S = rows_BQS.shape
    padded = torch.nn.functional.pad(rows_BQS.view(torch.uint8), (0, -S % 32))
    bits = torch.arange(8, dtype=torch.uint8, device=padded.device)
    bytes_BQW4 = (padded.reshape(B, Q, triton.cdiv(S, 32), 4, 8) << bits).sum(-1, dtype=torch.uint8)
    return bytes_BQW4.view(torch.int32).squeeze(-1)


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


def _architecture(device: torch.device) -> int:
    """The compute capability of an NVIDIA device, 90 for 9.0, and 0 for any other device."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class _Launch:
    """What all kernels of one call take: `inputs` (tensors), `sizes` (shapes and strides), `options`, `blocks`."""

    def __init__(self, query_BHQD, key_BKSD, groups_BS, visibility: Visibility, num_groups: int, span_B1=None):
        """`span_B1`: the first and the last key, (B, 1) each, outside of which the kernel need not look."""
        B, H, Q, D = query_BHQD.shape
        K, S = key_BKSD.shape[1:3]
        first_BQ, last_BQ = _key_bounds(visibility, B, Q, S, query_BHQD.device)
        if span_B1 is not None:
            first_BQ = torch.maximum(first_BQ, span_B1[0].to(first_BQ.dtype))
            last_BQ = torch.minimum(last_BQ, span_B1[1].to(last_BQ.dtype))
        groups_BS = groups_BS.int().contiguous()
        # A kernel does not touch the pointers of what is absent, but wants some tensor there.
        key_segment_BS = query_segment_BQ = rows_BQW = groups_BS
        row_strides = (0, 0)
        has_rows = visibility.rows_BQS is not None
        has_segments = not has_rows and visibility.segment_ids_BS is not None
        if has_rows:
            rows_BQW = _pack_rows(visibility.rows_BQS)
            row_strides = rows_BQW.stride()[:2]
        elif visibility.key_mask_BS is not None:
            groups_BS = groups_BS.masked_fill(~visibility.key_mask_BS.bool(), -1)  # No group: hidden from every query.
        if has_segments:
            key_segment_BS = visibility.segment_ids_BS.contiguous()
            query_segment_BQ = key_segment_BS.gather(1, visibility.positions_BQ.long())

        dtype = query_BHQD.dtype if query_BHQD.dtype == key_BKSD.dtype else torch.float32
        operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
        architecture = _architecture(query_BHQD.device)
        self.blocks = {
            kernel: CHOICES.get(kernel)
            or _block_sizes(kernel, D, torch.float32 if operand == tl.float32 else dtype, architecture)
            for kernel in KERNELS
        }
        self.sizes = (H, H // K, Q, S, D, *query_BHQD.stride(), *key_BKSD.stride(), *row_strides)
        self.options = dict(
            R=num_groups,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            TYPE=operand,
            # The interpreter's dot multiplies the raw bits of bfloat16, and its rounding to bfloat16 truncates.
            WIDEN=INTERPRETED,
            HAS_SEGMENTS=has_segments,
            HAS_ROWS=has_rows,
        )
        self.inputs = (query_BHQD, key_BKSD, groups_BS, first_BQ, last_BQ, query_segment_BQ, key_segment_BS, rows_BQW)


class _TritonMass(torch.autograd.Function):
    """The kernels behind `triton_mass`; between the passes it keeps q, k, the masses and one log-sum-exp a row."""

    @staticmethod
    def forward(ctx, query_BHQD, key_BKSD, groups_BS, visibility, scale, num_groups):
        launch = _Launch(query_BHQD, key_BKSD, groups_BS, visibility, num_groups)
        B, H, Q, D = query_BHQD.shape
        S = key_BKSD.shape[2]
        ctx.blocks, ctx.sizes, ctx.scale, ctx.options = launch.blocks, launch.sizes, scale, launch.options
        inputs = launch.inputs
        grid = _query_grid(ctx.blocks["forward"], B * H, Q, S)
        sums_NBHQR = query_BHQD.new_zeros((grid[1], B, H, Q, num_groups), dtype=torch.float32)
        maximum_NBHQ = torch.full_like(sums_NBHQR[..., 0], float("-inf"))
        if query_BHQD.numel() and key_BKSD.numel():
            options = dict(ctx.options, BLOCK_R=triton.next_power_of_2(num_groups), **ctx.blocks["forward"].options())
            with _device_of(query_BHQD):
                _forward_kernel[grid](*inputs, sums_NBHQR, maximum_NBHQ, scale * LOG2_E, *ctx.sizes, **options)
        if grid[1] == 1:
            base_BHQ, sums_BHQR = maximum_NBHQ[0], sums_NBHQR[0]
        else:  # The splits on a common maximum. A split that saw nothing has -inf, and so does a row that none saw.
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
        arguments = (ctx.scale, ctx.scale * LOG2_E, *ctx.sizes)
        empty = not (query_BHQD.numel() and key_BKSD.numel())
        exponent = None
        if ctx.options["TYPE"] == tl.float16 and not empty:
            # d loss / d score is rounded to float16 but may lie below its range. A power of two, which is exact, brings
            # the largest bracket to 2**14; a weight is at most 1, and what still underflows is 2**-38 of that.
            largest = bracket_BHQR.abs().nan_to_num(0.0, posinf=0.0).amax()
            exponent = (14 - torch.frexp(largest).exponent).clamp(max=100)
            bracket_BHQR = torch.ldexp(bracket_BHQR, exponent)
        grad_query_BHQD = grad_key_BKSD = None
        if ctx.needs_input_grad[0]:
            blocks = ctx.blocks["grad_query"]
            grid = _query_grid(blocks, B * H, Q, S)
            partial_NBHQD = query_BHQD.new_zeros((grid[1], B, H, Q, D), dtype=torch.float32)
            if not empty:
                with _device_of(query_BHQD):
                    _grad_query_kernel[grid](
                        *inputs, lse_BHQ, bracket_BHQR, partial_NBHQD, *arguments, **ctx.options, **blocks.options()
                    )
            grad_query_BHQD = partial_NBHQD.sum(0)
            if exponent is not None:
                grad_query_BHQD = torch.ldexp(grad_query_BHQD, -exponent)
            grad_query_BHQD = grad_query_BHQD.to(query_BHQD.dtype)
        if ctx.needs_input_grad[1]:
            grad_key_BKSD = key_BKSD.new_zeros((B, K, S, D), dtype=torch.float32)
            if not empty:
                blocks = ctx.blocks["grad_key"]
                options = dict(ctx.options, **blocks.options())
                ranges = _query_ranges(first_BQ, last_BQ, S, blocks.block_q, blocks.block_s)
                grid = (triton.cdiv(S, blocks.block_s), B * K)
                with _device_of(query_BHQD):
                    _grad_key_kernel[grid](
                        *inputs, lse_BHQ, bracket_BHQR, *ranges, grad_key_BKSD, *arguments, **options
                    )
            if exponent is not None:
                grad_key_BKSD = torch.ldexp(grad_key_BKSD, -exponent)
            grad_key_BKSD = grad_key_BKSD.to(key_BKSD.dtype)
        return grad_query_BHQD, grad_key_BKSD, None, None, None, None


def _check(query_BHQD, key_BKSD, groups_BS, visibility: Visibility, num_groups: int, lse_BHQ=None) -> None:
    """Refuse what the kernels cannot do, and tensors beyond whose end they would read."""
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
        ("lse_BHQ", lse_BHQ, (B, H, Q)),
    ]:
        # A kernel would read beyond the end of a tensor that is too small.
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have the shape {shape}; got {tuple(tensor.shape)}. Expand what is common to the samples."
            )


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
        bfloat16 and float16 the backward pass rounds d loss / d score to that type.

    Raises:
        ValueError: shapes that do not fit, a head size above 512, or a number of groups that is not 1 to 16.

    >>> q, k = torch.zeros(1, 1, 1, 16, device="cuda"), torch.zeros(1, 1, 4, 16, device="cuda")
    >>> groups = torch.tensor([[0, 1, 1, 1]], device="cuda")
    >>> triton_mass(q, k, groups, Visibility(torch.tensor([[3]], device="cuda")), scale=1.0, num_groups=2).tolist()
    [[[[0.25, 0.75]]]]
    """
    _check(query_BHQD, key_BKSD, groups_BS, visibility, num_groups)
    return _TritonMass.apply(query_BHQD, key_BKSD, groups_BS, visibility, scale, num_groups)


@torch.no_grad()
def triton_lse_mass(
    query_BHQD: torch.Tensor,
    key_BKSD: torch.Tensor,
    groups_BS: torch.Tensor,
    visibility: Visibility,
    scale: float,
    num_groups: int,
    lse_BHQ: torch.Tensor,
    columns: Sequence[int],
    span_B1: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The masses of `triton_mass` for some groups, from the log-sum-exp of the model's own attention. No gradient.

        mass_r(q) = sum_{visible k in group r} exp(scale * q . k - lse(q))

    Args:
        lse_BHQ: natural log-sum-exp of the scaled scores over all keys that each query sees, float32.
        columns: the groups whose masses are wanted.
        span_B1: the positions of the first and the last key of these groups, (B, 1) each (`KeysByRole.span_B1`).

    Returns:
        (B, H, Q, R) float32: nan in the other columns; 0 where a query sees no key of a group.

    Raises:
        ValueError: as `triton_mass`.
    """
    _check(query_BHQD, key_BKSD, groups_BS, visibility, num_groups, lse_BHQ)
    launch = _Launch(query_BHQD, key_BKSD, groups_BS, visibility, num_groups, span_B1)
    B, H, Q, _ = query_BHQD.shape
    blocks = launch.blocks["lse"]
    grid = _query_grid(blocks, B * H, Q, key_BKSD.shape[2])
    mass_NBHQR = query_BHQD.new_full((grid[1], B, H, Q, num_groups), float("nan"), dtype=torch.float32)
    wanted = sum(1 << int(column) for column in set(columns))
    if query_BHQD.numel() and key_BKSD.numel():
        with _device_of(query_BHQD):
            _lse_kernel[grid](
                *launch.inputs,
                lse_BHQ.float().contiguous(),
                mass_NBHQR,
                scale * LOG2_E,
                LOG2_E,
                *launch.sizes,
                WANTED=wanted,
                BLOCK_R=triton.next_power_of_2(num_groups),
                **launch.options,
                **blocks.options(),
            )
    return mass_NBHQR[0] if grid[1] == 1 else mass_NBHQR.sum(0)
