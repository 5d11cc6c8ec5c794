"""Paged attention on the CPU: blocks that lie side by side are read in place, those that several requests share once.

A cache in float32: with few queries the processor's half-precision kernel is many times slower, and an answer being
written has one. Knows neither requests nor models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_core.engine.attention import PagedCache, Span, slots_of, visible


@dataclass(frozen=True)
class _Prompt:
    """A request with several tokens in the batch: those from `first` on, over all of its tokens at `slots`."""

    first: int
    span: Span
    slots: Tensor | slice


@dataclass(frozen=True)
class _Run:
    """Tokens that lie side by side in the cache, and the batch's tokens that see all of them, in `rows`."""

    slots: slice
    rows: Tensor


@dataclass(frozen=True)
class _Runs:
    """`whole` are all that their row sees. `parts` are mixed: theirs are the results at `places` of a table that has a
    line for each of `rows` and `width` columns."""

    whole: list[_Run]
    parts: list[_Run]
    rows: Tensor
    width: int
    places: tuple[Tensor, Tensor]


class CpuBackend:
    """torch's fused attention, called for each run of blocks."""

    block_size = 16
    block_multiple = 1

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> CpuBatch:
        """Find the runs."""
        return CpuBatch(cache, spans)


class CpuBatch:
    """Prompts are read one by one. Answers are written together: what lies in one run is seen by one call."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
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
        self._runs: dict[int | None, _Runs] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        self._cache.write(layer, self._slots, key, value)
        keys, values = self._cache.keys[layer].flatten(0, 1), self._cache.values[layer].flatten(0, 1)
        out = torch.empty_like(query)
        for prompt in self._prompts:
            rows = slice(prompt.first, prompt.first + prompt.span.num_queries)
            mask = self._mask(prompt, query.shape[1] // keys.shape[1], window, query.dtype)
            out[rows] = _read(query[rows], keys[prompt.slots], values[prompt.slots], mask, scale)
        if self._writing:
            self._write(out, query, keys, values, scale, window)
        return out

    def _write(
        self, out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> None:
        """Fill the rows of requests that have one token in this step."""
        runs = self._runs_for(window)
        for run in runs.whole:
            out[run.rows] = _see(query[run.rows], keys[run.slots], values[run.slots], scale)[0].to(out.dtype)
        if not runs.parts:
            return
        # Softmax over several runs: each run's result counts as much as the sum of its exponentials.
        results = [_see(query[run.rows], keys[run.slots], values[run.slots], scale) for run in runs.parts]
        seen, logsumexp = (torch.cat(part) for part in zip(*results, strict=True))
        shape = (len(runs.rows), runs.width, *out.shape[1:])
        weights = torch.full(shape[:3], -torch.inf).index_put_(runs.places, logsumexp).softmax(1)
        mixed = (torch.zeros(shape).index_put_(runs.places, seen) * weights[..., None]).sum(1)
        out[runs.rows] = mixed.to(out.dtype)

    def _runs_for(self, window: int | None) -> _Runs:
        if window not in self._runs:
            self._runs[window] = _sort_runs(find_runs(self._writing, self._block_size, window))
        return self._runs[window]

    def _all_slots(self, span: Span) -> Tensor | slice:
        """Of all of a request's tokens: in place where they lie side by side."""
        size, blocks = self._block_size, span.blocks[: -(-span.length // self._block_size)]
        if blocks[-1] - blocks[0] + 1 == len(blocks) and all(b == blocks[0] + i for i, b in enumerate(blocks)):
            return slice(blocks[0] * size, blocks[0] * size + span.length)
        slots = torch.tensor(blocks)[:, None] * size + torch.arange(size)
        return slots.flatten()[: span.length]

    def _mask(self, prompt: _Prompt, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, for each query of each head of a group."""
        key = prompt.first, window
        if key not in self._masks:
            seen = visible(prompt.span.num_queries, prompt.span.length, window, torch.device("cpu"))
            added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._masks[key] = added.repeat_interleave(groups, dim=0)
        return self._masks[key]


def find_runs(spans: dict[int, Span], block_size: int, window: int | None) -> list[tuple[slice, list[int]]]:
    """Slots that lie side by side and are seen by the same rows of a batch; `spans` are by row, of one query each."""
    rows_of: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
    for row, span in spans.items():
        first = 0 if window is None else max(0, span.length - window)
        for index in range(first // block_size, -(-span.length // block_size)):
            start = max(first - index * block_size, 0)
            stop = min(span.length - index * block_size, block_size)
            rows_of[span.blocks[index], start, stop].append(row)
    runs: list[tuple[slice, list[int]]] = []
    for (block, start, stop), rows in sorted(rows_of.items()):
        here = slice(block * block_size + start, block * block_size + stop)
        if runs and runs[-1][0].stop == here.start and runs[-1][1] == rows:
            runs[-1] = slice(runs[-1][0].start, here.stop), rows
        else:
            runs.append((here, rows))
    return runs


def _sort_runs(found: list[tuple[slice, list[int]]]) -> _Runs:
    times = Counter(row for _, rows in found for row in rows)
    # What several rows see is never all of one: the token that a request writes is its own.
    whole = [_Run(slots, torch.tensor(rows)) for slots, rows in found if times[rows[0]] == 1]
    parts = [(slots, rows) for slots, rows in found if times[rows[0]] > 1]
    mixed = sorted({row for _, rows in parts for row in rows})
    lines, columns, next_column = [], [], Counter[int]()
    for _, rows in parts:
        for row in rows:
            lines.append(mixed.index(row))
            columns.append(next_column[row])
            next_column[row] += 1
    return _Runs(
        whole,
        [_Run(slots, torch.tensor(rows)) for slots, rows in parts],
        torch.tensor(mixed),
        max(columns, default=-1) + 1,
        (torch.tensor(lines), torch.tensor(columns)),
    )


def _read(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """A prompt's tokens, in the model's own precision: here it is arithmetic that takes the time."""
    folded = _fold(query, keys.shape[1])
    keys, values = (part.to(query.dtype).transpose(0, 1)[None] for part in (keys, values))
    return _unfold(F.scaled_dot_product_attention(folded, keys, values, mask, scale=scale)[0], len(query))


def _see(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Rows that see all of these tokens: the result (rows, num_heads, head_dim) in float32, and the logarithm of the
    sum of the scores' exponentials (rows, num_heads)."""
    folded = _fold(query.to(keys.dtype), keys.shape[1])
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    seen, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(folded, keys, values, scale=scale)
    return _unfold(seen[0], len(query)), _unfold(logsumexp[0][..., None], len(query))[..., 0]


def _fold(query: Tensor, num_kv_heads: int) -> Tensor:
    """(tokens, heads, dim) to (1, num_kv_heads, tokens * group, dim): the heads of a group read the same keys."""
    tokens, heads, dim = query.shape
    grouped = query.view(tokens, num_kv_heads, heads // num_kv_heads, dim)
    return grouped.transpose(0, 1).reshape(1, num_kv_heads, -1, dim)


def _unfold(seen: Tensor, tokens: int) -> Tensor:
    """The way back, from (num_kv_heads, tokens * group, dim)."""
    return seen.view(seen.shape[0], tokens, -1, seen.shape[-1]).transpose(0, 1).flatten(1, 2)
