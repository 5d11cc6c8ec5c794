"""Packed batches over a paged cache, and the attention they must yield: softmax over each request's own tokens.

The definition here knows no pages: requests keep their keys and values in one piece. Everything in the cache that
belongs to no request is NaN, so that any read of it shows in the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

from llava_core.engine.attention import Backend, CacheShape, PagedCache, Span, slots_of

SCALE = 0.3


@dataclass(frozen=True)
class Layout:
    """The requests of a batch. `requests` are (tokens before, new tokens, blocks shared with the previous request);
    `ahead` empty blocks follow each request's own."""

    block_size: int
    num_kv_heads: int
    groups: int
    head_dim: int
    requests: tuple[tuple[int, int, int], ...]
    ahead: int
    is_scattered: bool
    seed: int


@st.composite
def layouts(draw: st.DrawFn, block_sizes: tuple[int, ...] = (1, 3, 16), head_dims: tuple[int, ...] = (8, 20)) -> Layout:
    """Draws mixtures of prompts in prefill and answers in decode."""
    block_size = draw(st.sampled_from(block_sizes))
    before = st.integers(0, min(3 * block_size + 1, 700)) | st.sampled_from([0, block_size, 2 * block_size])
    new = st.just(1) | st.just(1) | st.integers(2, 9)
    requests = draw(st.lists(st.tuples(before, new, st.integers(0, 3)), min_size=1, max_size=6))
    return Layout(
        block_size,
        num_kv_heads=draw(st.sampled_from([1, 2])),
        groups=draw(st.sampled_from([1, 3])),
        head_dim=draw(st.sampled_from(head_dims)),
        requests=tuple(requests),
        ahead=draw(st.sampled_from([0, 2])),
        is_scattered=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


class Packed:
    """A layout filled with numbers. `keys` and `values` hold (length, num_kv_heads, head_dim) per request."""

    def __init__(self, layout: Layout, *, device: str = "cpu") -> None:
        self.layout = layout
        self.spans, num_blocks = _lay_out_blocks(layout)
        self.shape = CacheShape(1, num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)
        generator = torch.Generator().manual_seed(layout.seed)

        def draw(length: int, heads: int) -> Tensor:
            return torch.randn(length, heads, layout.head_dim, generator=generator).to(device)

        self.keys = [draw(span.length, layout.num_kv_heads) for span in self.spans]
        self.values = [draw(span.length, layout.num_kv_heads) for span in self.spans]
        for index, (_, _, wanted) in enumerate(layout.requests):
            shared = _num_shared(layout, index, wanted) * layout.block_size
            if shared:
                self.keys[index][:shared] = self.keys[index - 1][:shared]
                self.values[index][:shared] = self.values[index - 1][:shared]
        num_queries = sum(span.num_queries for span in self.spans)
        self.query = draw(num_queries, layout.num_kv_heads * layout.groups)

    def cache(
        self, dtype: torch.dtype = torch.float32, *, garbage: float = torch.nan, heads_first: bool = False
    ) -> PagedCache:
        """Builds the cache as it is before the step; unused slots hold `garbage`."""
        cache = PagedCache(self.shape, dtype, self.query.device, heads_first=heads_first)
        for pages in (*cache.keys, *cache.values):
            pages.fill_(garbage)
        for span, keys, values in zip(self.spans, self.keys, self.values, strict=True):
            num_before = span.length - span.num_queries
            if num_before:
                old = Span(num_before, num_before, span.blocks)
                slots = torch.tensor(slots_of([old], self.shape.block_size), device=self.query.device)
                cache.write(0, slots, keys[:num_before], values[:num_before])
        return cache

    def attend(
        self,
        backend: Backend,
        window: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        garbage: float = torch.nan,
    ) -> Tensor:
        """Computes attention with a backend, for a model that computes in `dtype`."""
        cache = self.cache(backend.cache_dtype(dtype), garbage=garbage, heads_first=backend.heads_first)
        # Heads first in memory, as a decoder produces them.
        query, key, value = (
            part.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
            for part in (self.query, self._new(self.keys), self._new(self.values))
        )
        return backend.batch(cache, self.spans).attend(0, query, key, value, SCALE, window)

    def expected(self, window: int | None = None) -> Tensor:
        """Computes attention by its definition, query by query."""
        rows: list[Tensor] = []
        for span, keys, values in zip(self.spans, self.keys, self.values, strict=True):
            for position in range(span.length - span.num_queries, span.length):
                first = 0 if window is None else max(0, position + 1 - window)
                visible_keys, visible_values = (part[first : position + 1].double() for part in (keys, values))
                query = self.query[len(rows)].double().view(self.layout.num_kv_heads, self.layout.groups, -1)
                weights = (torch.einsum("hgd,khd->hgk", query, visible_keys) * SCALE).softmax(-1)
                rows.append(torch.einsum("hgk,khd->hgd", weights, visible_values).flatten(0, 1))
        return torch.stack(rows).float()

    def _new(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part[-span.num_queries :] for part, span in zip(parts, self.spans, strict=True)])


def _num_shared(layout: Layout, index: int, wanted: int) -> int:
    """Counts the blocks that both requests had filled before this step."""
    if index == 0:
        return 0
    return min(wanted, *(before // layout.block_size for before, _, _ in layout.requests[index - 1 : index + 1]))


def _lay_out_blocks(layout: Layout) -> tuple[list[Span], int]:
    size = layout.block_size
    lengths = [before + new for before, new, _ in layout.requests]
    needed = [-(-length // size) + layout.ahead for length in lengths]
    num_blocks = sum(needed) + 2
    free_blocks = list(range(num_blocks))
    if layout.is_scattered:
        Random(layout.seed).shuffle(free_blocks)
    spans: list[Span] = []
    for index, (_, new, wanted) in enumerate(layout.requests):
        num_shared = _num_shared(layout, index, wanted)
        blocks = list(spans[-1].blocks[:num_shared]) if num_shared else []
        while len(blocks) < needed[index]:
            blocks.append(free_blocks.pop(0))
        spans.append(Span(new, lengths[index], blocks))
    return spans, num_blocks
