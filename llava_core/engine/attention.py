"""Attention over a paged cache: the state shared by a step's layers, the backend interface, and a plain reference.

The tokens of all requests in a step are packed one after another; each request's keys and values are in its blocks.
transformers' decoders use it under the name `paged`. Knows neither requests nor the management of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llava_core.models.fused import Batch

NAME = "paged"


@dataclass(frozen=True)
class Span:
    """One request's part of a packed batch: its `num_queries` tokens are the last of the `length` in `blocks`."""

    num_queries: int
    length: int
    blocks: Sequence[int]


@dataclass(frozen=True)
class CacheShape:
    """Blocks of `block_size` tokens, for each of `num_layers` layers."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_heads: int
    head_dim: int


class PagedCache:
    """Keys and values of every block: per layer (num_blocks, block_size, num_heads, head_dim). With `heads_first` the
    memory layout is head by head, whatever the order of the dimensions. `slots` views the same memory token by token:
    per layer keys and values, (num_blocks * block_size, num_heads, head_dim) each."""

    def __init__(
        self, shape: CacheShape, dtype: torch.dtype, device: torch.device, *, heads_first: bool = False
    ) -> None:
        self.shape = shape

        def pages() -> Tensor:
            blocks, heads = (shape.num_blocks, shape.block_size), (shape.num_heads,)
            size = (*heads, *blocks) if heads_first else (*blocks, *heads)
            # Zeroed now: the system commits memory only when it is first touched. In the middle of an answer that would
            # take tens of milliseconds, and would fail only then if there is no memory.
            zeros = torch.zeros(*size, shape.head_dim, dtype=dtype, device=device)
            return zeros.permute(1, 2, 0, 3) if heads_first else zeros

        self.keys = [pages() for _ in range(shape.num_layers)]
        self.values = [pages() for _ in range(shape.num_layers)]
        self.slots = [
            (keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `key` and `value` (tokens, num_heads, head_dim) in these slots (block * block_size + offset)."""
        keys, values = self.slots[layer]
        if key.dtype != keys.dtype:
            key, value = key.to(keys.dtype), value.to(keys.dtype)
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)


class Backend(Protocol):
    """One implementation of attention. Nothing else in the engine knows which one runs. `block_size` is its preferred
    block size, and any other must be a multiple of `block_multiple`; `heads_first` is the cache layout it needs."""

    block_size: int
    block_multiple: int
    heads_first: bool

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the cached keys and values of a model that computes in `dtype`."""
        ...

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> Batch:
        """The state shared by the layers of a step with these requests."""
        ...


@runtime_checkable
class RecordingBackend(Backend, Protocol):
    """A backend that can record decode steps (graphs.py)."""

    def decode_batch(self, cache: PagedCache, positions: Tensor, table: Tensor) -> Batch:
        """The state shared by the layers of a decode step in which row i is the token at `positions[i]` (rows,) of the
        text in the blocks `table[i]` (rows, blocks). The tensors' values may change between replays of the recorded
        step."""
        ...

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record `step`. The returned function replays it with the current values of its tensors and returns the result
        in the same tensor every time. Recording may run `step` any number of times."""
        ...


def slots_of(spans: Sequence[Span], block_size: int) -> list[int]:
    """The slots for the keys and values of a packed batch's tokens."""
    return [
        span.blocks[place // block_size] * block_size + place % block_size
        for span in spans
        for place in range(span.length - span.num_queries, span.length)
    ]


def table_of(spans: Collection[Span], block_size: int) -> Tensor:
    """Each request's blocks, padded with 0 to the number that the longest text fills: int32 (requests, blocks)."""
    table = np.zeros((len(spans), -(-max(span.length for span in spans) // block_size)), dtype=np.int32)
    for line, span in zip(table, spans, strict=True):
        blocks = span.blocks[: len(line)]
        line[: len(blocks)] = blocks
    return torch.from_numpy(table)


def slots_on_device(positions: Tensor, table: Tensor, block_size: int) -> Tensor:
    """The slots of one token per request, as in RecordingBackend.decode_batch, without reading values on the host."""
    blocks = table.gather(1, (positions // block_size)[:, None])[:, 0]
    return blocks * block_size + positions % block_size


def visible(num_queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `length` tokens each of the last `num_queries` sees: bool (num_queries, length)."""
    query = torch.arange(length - num_queries, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


class ReferenceBackend:
    """The reference definition: request by request, gathered, in float32."""

    block_size = 16
    block_multiple = 1
    heads_first = False

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype."""
        return dtype

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> ReferenceBatch:
        """A batch that computes everything in `attend`."""
        return ReferenceBatch(cache, spans)


class ReferenceBatch:
    """Softmax of scaled scores, written out."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._spans = spans
        self._slots = torch.tensor(slots_of(spans, cache.shape.block_size), device=cache.keys[0].device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        self._cache.write(layer, self._slots, key, value)
        queries = query.split([span.num_queries for span in self._spans])
        parts = zip(queries, self._spans, strict=True)
        return torch.cat([self._one(layer, part, span, scale, window) for part, span in parts])

    def _one(self, layer: int, query: Tensor, span: Span, scale: float, window: int | None) -> Tensor:
        blocks = torch.tensor(span.blocks, device=query.device)
        groups = query.shape[1] // self._cache.shape.num_heads
        keys, values = (
            pages[layer][blocks].flatten(0, 1)[: span.length].float().repeat_interleave(groups, dim=1)
            for pages in (self._cache.keys, self._cache.values)
        )
        scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
        seen = visible(span.num_queries, span.length, window, query.device)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged: Batch,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer, with tensors (1, heads, tokens, head_dim)."""
    assert attention_mask is None, "a paged batch does its own masking"
    layer = module.layer_idx
    assert isinstance(layer, int), layer
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    return paged.attend(layer, queries, keys, values, scaling, sliding_window)[None], None


AttentionInterface.register(NAME, _forward)
