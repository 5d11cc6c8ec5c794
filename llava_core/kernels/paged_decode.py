"""Attention of one query per request over a paged cache on a GPU, in Triton.

Everything that changes from step to step is read from tensors, so that a recorded graph of calls stays correct. Each
request's tokens are divided into parts of equal size, which are computed in parallel and combined by the logarithms of
their sums (FlashDecoding, Dao et al., 2023). The number of parts depends only on the request, so that its neighbours in
the batch do not change any rounding. Knows nothing about models or requests. Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens per part, and tokens loaded at a time.
PART, _TILE = 256, 64
# A matrix product needs at least this many rows and columns.
_LEAST = 16
_UNBOUNDED = 2**31 - 1
_LOG2_E = 1.4426950408889634


def attend_paged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Attention in which row i of `query` (rows, num_heads, head_dim) sees the last `window` of the first `lengths[i]`
    tokens in the blocks `table[i]` of `keys` and `values` (num_blocks, block_size, num_kv_heads, head_dim); returns a
    tensor shaped like `query`. Lengths must be at least 1 and at most `max_length`, by default the table's capacity.
    """
    rows, num_heads, head_dim = query.shape
    block_size, kv_heads = keys.shape[1:3]
    groups = num_heads // kv_heads
    parts = triton.cdiv(max_length or table.shape[1] * block_size, PART)
    assert keys.stride() == values.stride(), "keys and values lie differently"
    assert all(part.stride(-1) == 1 for part in (query, keys, values, table)), "numbers of a row lie apart"
    seen = query.new_empty(rows, num_heads, parts, head_dim, dtype=torch.float32)
    sums = query.new_empty(rows, num_heads, parts, dtype=torch.float32)
    out = query.new_empty(rows, num_heads, head_dim)
    padded_dim = max(_LEAST, triton.next_power_of_2(head_dim))
    first_seen = _UNBOUNDED if window is None else window
    with torch.cuda.device_of(query):
        _see_parts[rows, kv_heads, parts](
            query,
            keys,
            values,
            table,
            lengths,
            seen,
            sums,
            scale * _LOG2_E,
            first_seen,
            *query.stride()[:2],
            *keys.stride()[:3],
            table.stride(0),
            lengths.stride(0),
            block_size,
            groups,
            head_dim,
            max(_LEAST, triton.next_power_of_2(groups)),
            padded_dim,
            PART,
            _TILE,
        )
        _join_parts[rows, num_heads](
            seen,
            sums,
            lengths,
            out,
            first_seen,
            parts,
            lengths.stride(0),
            head_dim,
            padded_dim,
            PART,
        )
    return out


@triton.jit
def _see_parts(
    query,
    keys,
    values,
    table,
    lengths,
    seen,
    sums,
    scale,
    window,
    query_row,
    query_head,
    page_block,
    page_slot,
    page_head,
    table_row,
    length_row,
    BLOCK_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """Computes one part of one request for the query heads that share a key head: the weighted mean of its values, and
    the binary logarithm of the sum of its exponentials. Parts with no visible token are not written."""
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row * length_row).to(tl.int32)
    first = tl.maximum(length - window, 0)
    start = tl.maximum(part * PART, first // TILE * TILE)
    stop = tl.minimum(part * PART + PART, length)
    if start >= stop:
        return
    group, dim = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_DIM)
    is_group, is_dim = group < GROUPS, dim < HEAD_DIM
    is_own = is_group[:, None] & is_dim[None, :]
    heads = head * GROUPS + group
    asked = tl.load(query + row * query_row + heads[:, None] * query_head + dim[None, :], mask=is_own, other=0.0)
    largest = tl.full([PADDED_GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUPS], tl.float32)
    mean = tl.zeros([PADDED_GROUPS, PADDED_DIM], tl.float32)
    # Every tile holds a visible token, so the largest score is finite from the first tile on.
    for begin in range(start, stop, TILE):
        place = begin + tl.arange(0, TILE)
        is_seen = (place >= first) & (place < stop)
        block = tl.load(table + row * table_row + place // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
        at = block * page_block + place % BLOCK_SIZE * page_slot + head * page_head
        is_there = is_seen[:, None] & is_dim[None, :]
        key = tl.load(keys + at[:, None] + dim[None, :], mask=is_there, other=0.0)
        value = tl.load(values + at[:, None] + dim[None, :], mask=is_there, other=0.0)
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        weights = tl.exp2(scores - largest[:, None])
        kept = tl.exp2(before - largest)
        total = total * kept + tl.sum(weights, 1)
        mean = mean * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    at = (row * tl.num_programs(1) * GROUPS + heads) * tl.num_programs(2) + part
    tl.store(sums + at, largest + tl.log2(total), mask=is_group)
    tl.store(seen + at[:, None] * HEAD_DIM + dim[None, :], mean / total[:, None], mask=is_own)


@triton.jit
def _join_parts(
    seen,
    sums,
    lengths,
    out,
    window,
    parts,
    length_row,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PART: tl.constexpr,
):
    """Combines the parts of one request's head in order, independently of other requests: each is weighted by the sum
    of its exponentials."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + row * length_row).to(tl.int32)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    at = (row * tl.num_programs(1) + head) * parts
    largest = float("-inf")
    total = 0.0
    mean = tl.zeros([PADDED_DIM], tl.float32)
    for part in range(tl.maximum(length - window, 0) // PART, tl.cdiv(length, PART)):
        logarithm = tl.load(sums + at + part)
        before = largest
        largest = tl.maximum(before, logarithm)
        kept, weight = tl.exp2(before - largest), tl.exp2(logarithm - largest)
        total = total * kept + weight
        mean = mean * kept + weight * tl.load(seen + (at + part) * HEAD_DIM + dim, mask=is_dim, other=0.0)
    at_out = (row * tl.num_programs(1) + head) * HEAD_DIM + dim
    tl.store(out + at_out, (mean / total).to(out.dtype.element_ty), mask=is_dim)
