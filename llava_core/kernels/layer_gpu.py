"""A layer's operations other than matrix products, on a GPU, in Triton: each is one pass over its numbers.

In torch each is several operations, every one of which reads and writes all numbers again. Computed in float32 and
rounded once. The host reads no values, so that steps can be recorded. Knows shapes, and neither models nor requests.
Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Numbers, and heads, that one program processes.
_NUMBERS, _HEADS = 1024, 8


class GpuKernels:
    """The counterpart of native.NativeKernels for GPU tensors of any floating dtype, contiguous unless noted."""

    def add_norm_(self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """`hidden` (rows, size) += `added`, in place; the result divided by its root mean square, times `weight`."""
        assert hidden.is_contiguous(), "numbers of a row lie apart"
        assert added is None or added.is_contiguous(), "numbers of a row lie apart"
        normed = torch.empty_like(hidden)
        rows, size = hidden.shape
        block = triton.next_power_of_2(size)
        other = hidden if added is None else added
        with torch.cuda.device_of(hidden):
            _add_norm[rows,](
                hidden, other, weight, normed, size, eps, added is not None, block, num_warps=8 if block > 2048 else 4
            )
        return normed

    def rotate_(self, projected: Tensor, num_heads: int, cos: Tensor, signed_sin: Tensor, positions: Tensor) -> None:
        """Rotate the first `num_heads` heads of each row of `projected` (rows, heads, head_dim), in place, by the row's
        position in the text, `positions` int64 (rows,); `cos` and `signed_sin` (positions, 1, head_dim) are those of
        models/fused.py."""
        rows, all_heads, dim = projected.shape
        assert all(part.is_contiguous() for part in (projected, cos, signed_sin)), "numbers of a row lie apart"
        with torch.cuda.device_of(projected):
            _rotate[rows, triton.cdiv(num_heads, _HEADS)](
                projected,
                cos,
                signed_sin,
                positions,
                positions.stride(0),
                num_heads,
                all_heads * dim,
                dim // 2,
                triton.next_power_of_2(dim // 2),
                _HEADS,
            )

    def gate(self, both: Tensor) -> Tensor:
        """SiLU of the first half of `both` (rows, 2 * size), times the second: (rows, size)."""
        assert both.is_contiguous(), "numbers of a row lie apart"
        rows, size = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, size)
        with torch.cuda.device_of(both):
            _gate[rows, triton.cdiv(size, _NUMBERS)](both, out, size, _NUMBERS)
        return out


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Copy `key` and `value` (rows, heads, head_dim) to `slots` int64 (rows,) of `keys` and `values` (slots, heads,
    head_dim), both contiguous."""
    assert keys.is_contiguous(), "heads of a row lie apart"
    assert values.is_contiguous(), "heads of a row lie apart"
    # Parts of a product are contiguous already; tensors from transformers' modules are copied here.
    key, value = key.flatten(1), value.flatten(1)
    rows, size = key.shape
    with torch.cuda.device_of(key):
        _store[rows, triton.cdiv(size, _NUMBERS)](
            key, value, keys, values, slots, key.stride(0), value.stride(0), size, _NUMBERS
        )


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), as in CLIP."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply to a tensor of any shape."""
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        with torch.cuda.device_of(hidden):
            _quick_gelu[triton.cdiv(hidden.numel(), _NUMBERS),](hidden, out, hidden.numel(), _NUMBERS)
        return out


@triton.jit
def _add_norm(hidden, added, weight, normed, size, eps, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    is_there = place < size
    at = tl.program_id(0).to(tl.int64) * size + place
    numbers = tl.load(hidden + at, mask=is_there, other=0.0)
    if HAS_ADDED:
        other = tl.load(added + at, mask=is_there, other=0.0)
        # The sum is rounded to the numbers' own precision, and the rounded sum is normalised.
        numbers = (numbers.to(tl.float32) + other.to(tl.float32)).to(numbers.dtype)
        tl.store(hidden + at, numbers, mask=is_there)
    wide = numbers.to(tl.float32)
    factor = 1 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    scale = tl.load(weight + place, mask=is_there, other=0.0).to(tl.float32)
    tl.store(normed + at, (wide * factor * scale).to(normed.dtype.element_ty), mask=is_there)


@triton.jit
def _rotate(
    projected,
    cos,
    signed_sin,
    positions,
    position_row,
    num_heads,
    row_size,
    half,
    PADDED_HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    place = tl.arange(0, PADDED_HALF)
    is_half = place < half
    turn = tl.load(positions + row * position_row) * 2 * half + place
    cos_low = tl.load(cos + turn, mask=is_half, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + turn + half, mask=is_half, other=0.0).to(tl.float32)
    sin_low = tl.load(signed_sin + turn, mask=is_half, other=0.0).to(tl.float32)
    sin_high = tl.load(signed_sin + turn + half, mask=is_half, other=0.0).to(tl.float32)
    is_there = (head < num_heads)[:, None] & is_half[None, :]
    at = row * row_size + head[:, None] * 2 * half + place[None, :]
    low = tl.load(projected + at, mask=is_there, other=0.0).to(tl.float32)
    high = tl.load(projected + at + half, mask=is_there, other=0.0).to(tl.float32)
    turned_low = low * cos_low[None, :] + high * sin_low[None, :]
    turned_high = high * cos_high[None, :] + low * sin_high[None, :]
    tl.store(projected + at, turned_low.to(projected.dtype.element_ty), mask=is_there)
    tl.store(projected + at + half, turned_high.to(projected.dtype.element_ty), mask=is_there)


@triton.jit
def _gate(both, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < size
    gate = tl.load(both + row * 2 * size + place, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * size + size + place, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + row * size + place, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=is_there)


@triton.jit
def _store(key, value, keys, values, slots, key_row, value_row, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < size
    at = tl.load(slots + row).to(tl.int64) * size + place
    tl.store(keys + at, tl.load(key + row * key_row + place, mask=is_there), mask=is_there)
    tl.store(values + at, tl.load(value + row * value_row + place, mask=is_there), mask=is_there)


@triton.jit
def _quick_gelu(hidden, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < count
    numbers = tl.load(hidden + at, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + at, (numbers * tl.sigmoid(1.702 * numbers)).to(out.dtype.element_ty), mask=is_there)
