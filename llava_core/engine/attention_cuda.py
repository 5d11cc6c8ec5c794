"""Paged attention on a GPU: torch's variable-length kernel reads the blocks where they lie.

Source: torch.nn.attention.varlen, with `block_table` and `seqused_k`. Knows neither requests nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llava_core.engine.attention import PagedCache, Span, slots_of


class CudaBackend:
    """One kernel for prompts and answers alike, for half precisions."""

    # FlashAttention 2 takes no other blocks than of multiples of 256 tokens.
    block_size = 256
    block_multiple = 256
    heads_first = False

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's own."""
        return dtype

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> CudaBatch:
        """Put the tables on the device, once for all layers."""
        return CudaBatch(cache, spans)


class CudaBatch:
    """Tables of one step."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        device = cache.keys[0].device
        size = cache.shape.block_size
        widest = max(-(-span.length // size) for span in spans)
        table = [[*span.blocks[:widest], *[0] * (widest - len(span.blocks))] for span in spans]
        self._cache = cache
        self._slots = torch.tensor(slots_of(spans, size), device=device)
        self._table = torch.tensor(table, dtype=torch.int32, device=device)
        self._lengths = torch.tensor([span.length for span in spans], dtype=torch.int32, device=device)
        starts = [0, *accumulate(span.num_queries for span in spans)]
        self._starts = torch.tensor(starts, dtype=torch.int32, device=device)
        self._max_queries = max(span.num_queries for span in spans)
        self._max_length = max(span.length for span in spans)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        from torch.nn.attention.varlen import varlen_attn

        self._cache.write(layer, self._slots, key, value)
        seen = varlen_attn(
            query,
            self._cache.keys[layer],
            self._cache.values[layer],
            self._starts,
            None,
            self._max_queries,
            self._max_length,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != self._cache.shape.num_heads,
            seqused_k=self._lengths,
            block_table=self._table,
            **_fixed_splits(),
        )
        assert isinstance(seen, Tensor)
        return seen


@cache
def _fixed_splits() -> dict[str, Any]:
    """Else the splits, and so the roundings, of one request would follow the longest in the batch. Older versions of
    torch know no splits."""
    from torch.nn.attention.varlen import varlen_attn

    return {"num_splits": 1} if "num_splits" in signature(varlen_attn).parameters else {}
