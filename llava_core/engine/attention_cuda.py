"""Paged attention on a GPU: answers by a kernel that reads the blocks in place, prompts by torch's attention.

Knows neither requests nor models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_core.engine.attention import PagedCache, Span, slots_of, slots_on_device, table_of, visible


@dataclass(frozen=True)
class _Prompt:
    """A request with several tokens in the batch, at `rows`. All of its tokens are at `slots`, which is None where all
    of them are in the batch itself."""

    rows: slice
    span: Span
    slots: Tensor | None


class CudaBackend:
    """Supports every precision."""

    block_size = 16
    block_multiple = 1
    heads_first = False

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype."""
        return dtype

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> MixedBatch:
        """Copy the description of these requests to the device, once for all layers."""
        return MixedBatch(cache, spans)

    def decode_batch(self, cache: PagedCache, positions: Tensor, table: Tensor) -> DecodeBatch:
        """A batch from tensors that are on the device already."""
        return DecodeBatch(cache, positions, table)

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record into a CUDA graph."""
        with torch.cuda.device_of(step()):
            self._warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as a tower's in this process, may keep using the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = step()

        def replay() -> Tensor:
            with torch.cuda.device_of(out):
                graph.replay()
            return out

        return replay

    def _warm_up(self, step: Callable[[], Tensor]) -> None:
        """Run `step` once on a side stream, as recording will: kernels are compiled and libraries allocate their
        workspaces before anything is recorded."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)

    @cached_property
    def _pool(self) -> Any:
        """Memory shared by all graphs: none needs its contents any more when the next one runs."""
        return torch.cuda.graph_pool_handle()


class DecodeBatch:
    """Requests with one token each, at `positions` (rows,) of their texts; `table` (rows, blocks) names their blocks.
    Only the device reads the tensors' values, when it computes."""

    def __init__(self, cache: PagedCache, positions: Tensor, table: Tensor, max_length: int | None = None) -> None:
        self._cache, self._table, self._max_length = cache, table, max_length
        self._slots = slots_on_device(positions, table, cache.shape.block_size)
        self._lengths = positions + 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        _store(self._cache, layer, self._slots, key, value)
        return self.see(layer, query, scale, window)

    def see(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention without storing: the new keys and values are in the cache already."""
        # Triton is installed wherever CUDA is.
        from llava_core.kernels.paged_decode import attend_paged

        return attend_paged(
            query,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._table,
            self._lengths,
            scale=scale,
            window=window,
            max_length=self._max_length,
        )


class MixedBatch:
    """Prompts are computed one by one from gathered keys and values; the gathering costs little next to their matrix
    products. Answers are computed together."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys[0].device
        self._slots = torch.tensor(slots_of(spans, cache.shape.block_size), device=device)
        self._prompts: list[_Prompt] = []
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        writing: dict[int, Span] = {}
        first = 0
        for span in spans:
            if span.num_queries == 1:
                writing[first] = span
            else:
                rows = slice(first, first + span.num_queries)
                self._prompts.append(_Prompt(rows, span, self._slots_to_read(span)))
            first += span.num_queries
        self._rows = torch.tensor(list(writing), device=device)
        self._answers = _decode_batch(cache, list(writing.values())) if writing else None

    def _slots_to_read(self, span: Span) -> Tensor | None:
        if span.num_queries == span.length:
            return None
        slots = slots_of([replace(span, num_queries=span.length)], self._cache.shape.block_size)
        return torch.tensor(slots, device=self._slots.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        _store(self._cache, layer, self._slots, key, value)
        keys, values = self._cache.slots[layer]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for prompt in self._prompts:
            rows, mask = prompt.rows, self._mask(prompt, window)
            slots = prompt.slots
            known = (key[rows], value[rows]) if slots is None else (keys[slots], values[slots])
            out[rows] = _read(query[rows], *known, mask, scale)
        if self._answers is not None:
            out[self._rows] = self._answers.see(layer, query[self._rows], scale, window)
        return out

    def _mask(self, prompt: _Prompt, window: int | None) -> Tensor | None:
        """The attention mask; None for plain causal attention, which needs none."""
        num_queries, length = prompt.span.num_queries, prompt.span.length
        if prompt.slots is None and (window is None or window >= length):
            return None
        key = prompt.rows.start, window
        if key not in self._masks:
            self._masks[key] = visible(num_queries, length, window, self._slots.device)
        return self._masks[key]


def _store(cache: PagedCache, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
    from llava_core.kernels.layer_gpu import store

    store(key, value, *cache.slots[layer], slots)


def _decode_batch(cache: PagedCache, spans: Sequence[Span]) -> DecodeBatch:
    device, lengths = cache.keys[0].device, [span.length for span in spans]
    positions = torch.tensor(lengths, device=device) - 1
    table = table_of(spans, cache.shape.block_size).to(device, torch.int64)
    return DecodeBatch(cache, positions, table, max(lengths))


def _read(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one prompt's tokens; all tensors are (tokens, heads, head_dim)."""
    query, keys, values = (part.transpose(0, 1)[None] for part in (query, keys, values))
    if mask is not None:
        # Kernels that take a mask do not support grouped keys.
        groups = query.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
    seen = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return seen[0].transpose(0, 1)
