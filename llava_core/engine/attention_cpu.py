"""Paged attention on the CPU: a long run of blocks that several requests share, or that is all of one request, is read
in place; other blocks are gathered and read by one call.

Keys and values are laid out head by head, so that those of one head are contiguous. Knows neither requests nor models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llava_core.engine.attention import PagedCache, Span, slots_of, visible
from llava_core.engine.attention_plan import BlockTable, Gathered, Plan, block_table, find_runs, plan_reads
from llava_core.kernels.attention import attend, kept_dtype
from llava_core.kernels.native import NativeKernels, can_attend, native_kernels

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class _Prompt:
    """A request with several tokens in the batch, from row `first` on, which attend to all of its tokens at `slots`."""

    first: int
    span: Span
    slots: Tensor | slice


class CpuBackend:
    """Uses our own kernels where they can be compiled, otherwise torch's fused attention for each part of the cache."""

    block_size = 16
    block_multiple = 1
    heads_first = True

    def __init__(self, *, use_kernels: bool = True) -> None:
        self._use_kernels = use_kernels

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As in kernels/attention.py."""
        return kept_dtype(dtype, "cpu")

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> CpuBatch:
        """Split the requests into prompts and answers."""
        is_possible = self._use_kernels and can_attend(cache.shape.head_dim)
        return CpuBatch(cache, spans, native_kernels(cache.keys[0].dtype) if is_possible else None)


class CpuBatch:
    """Prompts are computed one by one. Answers are computed together, with one call per contiguous run of the cache."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span], kernels: NativeKernels | None) -> None:
        self._cache = cache
        self._kernels = kernels
        self._block_size = cache.shape.block_size
        self._slots = torch.tensor(slots_of(spans, self._block_size))
        self._prompts: list[_Prompt] = []
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        writing: dict[int, Span] = {}
        first = 0
        for span in spans:
            if span.num_queries == 1:
                writing[first] = span
            else:
                self._prompts.append(_Prompt(first, span, self._all_slots(span)))
            first += span.num_queries
        self._writing = writing
        self._plans: dict[int | None, Plan] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        keys, values = self._cache.slots[layer]
        if self._kernels is None:
            self._cache.write(layer, self._slots, key, value)
        else:
            self._kernels.store(key.to(keys.dtype), keys, self._slots)
            self._kernels.store(value.to(keys.dtype), values, self._slots)
        if not self._prompts and self._written(window, query.dtype) == slice(0, len(query)):
            return self._write(query, keys, values, scale, window)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for prompt in self._prompts:
            rows = slice(prompt.first, prompt.first + prompt.span.num_queries)
            mask = self._mask(prompt, query.shape[1] // keys.shape[1], window, query.dtype)
            out[rows] = _read(query[rows], keys[prompt.slots], values[prompt.slots], mask, scale)
        if self._writing:
            out[self._written(window, query.dtype)] = self._write(query, keys, values, scale, window)
        return out

    @cached_property
    def _table(self) -> BlockTable:
        return block_table(self._writing, self._block_size)

    def _written(self, window: int | None, dtype: torch.dtype) -> Tensor | slice:
        """The rows whose results `_write` returns, in its order."""
        return self._plan(window, dtype).rows if self._kernels is None else self._table.rows

    def _write(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
        """Results of the requests that have one token in this step: (rows, num_heads, head_dim)."""
        if self._kernels is None:
            return self._write_by_plan(self._plan(window, query.dtype), query, keys, values, scale)
        table = self._table
        own = query[table.rows].to(keys.dtype)
        seen = self._kernels.attend(own, keys, values, table.blocks, table.lengths, self._block_size, window, scale)
        return seen.to(query.dtype)

    def _plan(self, window: int | None, dtype: torch.dtype) -> Plan:
        """The plan for the requests that have one token in this step."""
        if window not in self._plans:
            kept = kept_dtype(dtype, "cpu")
            self._plans[window] = plan_reads(find_runs(self._writing, self._block_size, window), kept)
        return self._plans[window]

    def _write_by_plan(self, plan: Plan, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """The results (rows, num_heads, head_dim) of a plan's rows; `keys` and `values` (slots, heads, head_dim)."""
        dtype, query = query.dtype, query.to(keys.dtype)
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        is_mixed = plan.table is not None
        results = [_see_run(query[run.rows], keys[:, run.slots], values[:, run.slots], scale) for run in plan.runs]
        results += [
            _see_gathered(query[part.rows], keys, values, part, scale, is_mixed=is_mixed) for part in plan.gathered
        ]
        if plan.table is None:
            seen = [seen for seen, _ in results]
            return (seen[0] if len(seen) == 1 else torch.cat(seen)).to(dtype)
        # Softmax over several parts: each part's result is weighted by the sum of its exponentials.
        heads, head_dim = query.shape[1:]
        together = torch.cat([*(seen for seen, _ in results), query.new_zeros(1, heads, head_dim)])
        logsumexp = torch.cat([*(sums for _, sums in results), torch.full((1, heads), -torch.inf)])
        weights = logsumexp[plan.table].softmax(1)
        return (together[plan.table] * weights[..., None]).sum(1).to(dtype)

    def _all_slots(self, span: Span) -> Tensor | slice:
        """The slots of all of a request's tokens: a slice, which needs no copy, where they are contiguous."""
        size, blocks = self._block_size, span.blocks[: -(-span.length // self._block_size)]
        if blocks[-1] - blocks[0] + 1 == len(blocks) and all(b == blocks[0] + i for i, b in enumerate(blocks)):
            return slice(blocks[0] * size, blocks[0] * size + span.length)
        slots = torch.tensor(blocks)[:, None] * size + torch.arange(size)
        return slots.flatten()[: span.length]

    def _mask(self, prompt: _Prompt, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask added to the scores, for each query of each head of a group."""
        key = prompt.first, window
        if key not in self._masks:
            seen = visible(prompt.span.num_queries, prompt.span.length, window, torch.device("cpu"))
            added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._masks[key] = added.repeat_interleave(groups, dim=0)
        return self._masks[key]


def _read(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of a prompt's tokens, in the model's own precision."""
    folded = _fold(query, keys.shape[1])
    keys, values = (part.to(query.dtype).transpose(0, 1)[None] for part in (keys, values))
    return _unfold(attend(folded, keys, values, mask, scale=scale)[0], len(query))


def _see_run(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of rows that all see all of these tokens: the result (rows, num_heads, head_dim), and the logarithm of
    the sum of the scores' exponentials (rows, num_heads) in float32."""
    seen, logsumexp = _see(_fold(query, len(keys)), keys[None], values[None], None, scale)
    return _unfold(seen[0], len(query)), _unfold(logsumexp[0, :, :, None], len(query))[..., 0]


def _see_gathered(
    query: Tensor, keys: Tensor, values: Tensor, part: Gathered, scale: float, *, is_mixed: bool
) -> tuple[Tensor, Tensor]:
    """The same for rows that each see their own tokens; the logarithms are valid only with `is_mixed`."""
    rows, heads = len(query), len(keys)
    keys, values = (pages.index_select(1, part.slots).unflatten(1, (rows, -1)) for pages in (keys, values))
    grouped = query.unflatten(1, (heads, -1))
    if rows > 1 and grouped.shape[2] == 1 and query.dtype == torch.bfloat16:
        return _see_written(query.transpose(0, 1), keys, values, part.mask, scale, is_mixed=is_mixed)
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)
    mask = None if part.mask is None else part.mask[:, None, None]
    seen, logsumexp = _see(grouped, keys, values, mask, scale)
    return seen.flatten(1, 2), logsumexp.flatten(1)


def _see(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The result (batch, num_kv_heads, queries, head_dim) and logarithms (batch, num_kv_heads, queries)."""
    num_queries = query.shape[2]
    if num_queries == 1 and query.dtype == torch.bfloat16:
        # The kernel takes three times as long for one query as for two.
        query = query.expand(-1, -1, 2, -1)
    seen, logsumexp = _FUSED(query, keys, values, attn_mask=mask, scale=scale)
    return seen[:, :, :num_queries], logsumexp[:, :, :num_queries]


def _see_written(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, *, is_mixed: bool
) -> tuple[Tensor, Tensor]:
    """The same for `query` (heads, rows, head_dim) over (heads, rows, tokens, head_dim), written out as matrix
    products: for many rows of one query each, the fused kernel takes several times as long."""
    heads, rows, length, head_dim = keys.shape
    query, keys, values = query.reshape(-1, 1, head_dim), keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.baddbmm(query.new_zeros(1), query, keys.transpose(1, 2), beta=0, alpha=scale)
    if mask is not None:
        scores.view(heads, rows, length).add_(mask)
    seen = torch.bmm(scores.softmax(-1), values).view(heads, rows, head_dim).transpose(0, 1)
    if not is_mixed:
        return seen, scores.new_empty(0)
    return seen, scores.float().logsumexp(-1).view(heads, rows).transpose(0, 1)


def _fold(query: Tensor, num_kv_heads: int) -> Tensor:
    """Reshape (tokens, heads, dim) to (1, num_kv_heads, tokens * group, dim): a group's heads read the same keys."""
    tokens, heads, dim = query.shape
    grouped = query.view(tokens, num_kv_heads, heads // num_kv_heads, dim)
    return grouped if tokens == 1 else grouped.transpose(0, 1).reshape(1, num_kv_heads, -1, dim)


def _unfold(seen: Tensor, tokens: int) -> Tensor:
    """The inverse of `_fold`, from (num_kv_heads, tokens * group, dim)."""
    return seen.view(seen.shape[0], tokens, -1, seen.shape[-1]).transpose(0, 1).flatten(1, 2)
