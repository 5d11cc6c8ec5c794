"""Paged attention on the CPU: a long stretch of blocks that several requests share, or that is all of one, is read in
place; the others are gathered and read by one call.

Keys and values lie head by head, so that a head's lie side by side. Knows neither requests nor models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llava_core.engine.attention import PagedCache, Span, slots_of, visible
from llava_core.kernels.attention import attend, kept_dtype

# Each part is a call, and two parts have to be mixed, which takes as long as to copy about so many tokens: of several
# requests' each, and of one's alone.
_LONG = 256
_LONG_ALONE = 1024
# Half precision's products are prepared for each new shape, which takes longer than they do: a line grows by so much.
_GROWTH, _FEW = 32, 2**17


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
    rows: Tensor | slice


@dataclass(frozen=True)
class _Gathered:
    """For each of `rows` as many `slots` as the longest has, those that `mask` (rows, longest) leaves out its own as
    well."""

    slots: Tensor
    rows: Tensor | slice
    mask: Tensor | None


@dataclass
class _Plan:
    """Which parts of the cache are read, and how their results come together: `table` has for each of `rows` the lines
    of the parts' results, put one below the other, that are its own; those it has fewer of are an empty line at the
    end. None where each row has one line, in order of `rows`."""

    runs: list[_Run] = field(default_factory=list)
    gathered: list[_Gathered] = field(default_factory=list)
    rows: Tensor | slice = field(default_factory=lambda: slice(0))
    table: Tensor | None = None


class CpuBackend:
    """torch's fused attention, called for each part of the cache."""

    block_size = 16
    block_multiple = 1
    heads_first = True

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As in kernels/attention.py."""
        return kept_dtype(dtype, "cpu")

    def batch(self, cache: PagedCache, spans: Sequence[Span]) -> CpuBatch:
        """Find the parts."""
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
        self._plans: dict[int | None, _Plan] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """As Batch.attend."""
        self._cache.write(layer, self._slots, key, value)
        keys, values = (pages.flatten(0, 1) for pages in (self._cache.keys[layer], self._cache.values[layer]))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for prompt in self._prompts:
            rows = slice(prompt.first, prompt.first + prompt.span.num_queries)
            mask = self._mask(prompt, query.shape[1] // keys.shape[1], window, query.dtype)
            out[rows] = _read(query[rows], keys[prompt.slots], values[prompt.slots], mask, scale)
        if self._writing:
            self._write(out, query.to(keys.dtype), keys.transpose(0, 1), values.transpose(0, 1), scale, window)
        return out

    def _write(
        self, out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> None:
        """Fill the rows of requests that have one token in this step; `keys` and `values` (heads, slots, head_dim)."""
        if window not in self._plans:
            self._plans[window] = _plan(find_runs(self._writing, self._block_size, window), query.dtype)
        plan = self._plans[window]
        mixes = plan.table is not None
        results = [
            *(_see_run(query[run.rows], keys[:, run.slots], values[:, run.slots], scale) for run in plan.runs),
            *(_see_gathered(query[part.rows], keys, values, part, scale, mixes=mixes) for part in plan.gathered),
        ]
        if plan.table is None:
            out[plan.rows] = torch.cat([seen for seen, _ in results]).to(out.dtype)
            return
        # Softmax over several parts: each part's result counts as much as the sum of its exponentials.
        heads, head_dim = out.shape[1:]
        seen = torch.cat([*(seen for seen, _ in results), query.new_zeros(1, heads, head_dim)])
        logsumexp = torch.cat([*(sums for _, sums in results), torch.full((1, heads), -torch.inf)])
        weights = logsumexp[plan.table].softmax(1)
        out[plan.rows] = (seen[plan.table] * weights[..., None]).sum(1).to(out.dtype)

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
    rows_of: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for row, span in spans.items():
        first = 0 if window is None else max(0, span.length - window)
        starts = [block * block_size for block in span.blocks[first // block_size : -(-span.length // block_size)]]
        stops = [start + block_size for start in starts]
        starts[0] += first % block_size
        stops[-1] -= -span.length % block_size
        for piece in zip(starts, stops, strict=True):
            rows_of[piece].append(row)
    runs: list[tuple[slice, list[int]]] = []
    for (start, stop), rows in sorted(rows_of.items()):
        if runs and runs[-1][0].stop == start and runs[-1][1] == rows:
            runs[-1] = slice(runs[-1][0].start, stop), rows
        else:
            runs.append((slice(start, stop), rows))
    return runs


def _plan(found: list[tuple[slice, list[int]]], dtype: torch.dtype) -> _Plan:
    plan, lines = _Plan(), list[int]()
    parts = Counter(row for _, rows in found for row in rows)
    short: defaultdict[int, list[slice]] = defaultdict(list)
    for slots, rows in found:
        is_whole = len(rows) == 1 and parts[rows[0]] == 1
        if slots.stop - slots.start >= (_LONG if is_whole or len(rows) > 1 else _LONG_ALONE):
            plan.runs.append(_Run(slots, _as_index(rows)))
            lines += rows
        else:
            for row in rows:
                short[row].append(slots)
    for group in _alike(short):
        plan.gathered.append(_gather(group, dtype))
        lines += group
    times = Counter(lines)
    if max(times.values()) == 1:
        plan.rows = _as_index(lines)
        return plan
    own: defaultdict[int, list[int]] = defaultdict(list)
    for line, row in enumerate(lines):
        own[row].append(line)
    plan.rows = _as_index(list(own))
    width = max(times.values())
    plan.table = torch.tensor([[*mine, *[len(lines)] * (width - len(mine))] for mine in own.values()])
    return plan


def _alike(short: Mapping[int, list[slice]]) -> list[dict[int, list[slice]]]:
    """Rows that are gathered together: all lines are as long as the longest, so none may be much longer than others."""
    groups, shortest = list[dict[int, list[slice]]](), 0
    for row, pieces in sorted(short.items(), key=lambda item: _num_slots(item[1])):
        length = _num_slots(pieces)
        if not groups or length > max(_LONG, 2 * shortest):
            groups.append({})
            shortest = length
        groups[-1][row] = pieces
    return [dict(sorted(group.items())) for group in groups]


def _gather(pieces_by_row: Mapping[int, list[slice]], dtype: torch.dtype) -> _Gathered:
    lengths = [_num_slots(pieces) for pieces in pieces_by_row.values()]
    longest = max(lengths)
    if len(lengths) > 1 and dtype == torch.bfloat16:
        longest += -longest % _GROWTH
    slots = np.empty((len(lengths), longest), dtype=np.int64)
    for line, pieces in zip(slots, pieces_by_row.values(), strict=True):
        # Whatever the mask leaves out must be the row's own: others' may be no numbers.
        line[:] = pieces[0].start
        first = 0
        for piece in pieces:
            stop = first + piece.stop - piece.start
            line[first:stop] = np.arange(piece.start, piece.stop)
            first = stop
    mask = None
    if min(lengths) < longest:
        left_out = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(slots.shape, dtype=dtype).masked_fill_(left_out, -torch.inf)
    return _Gathered(torch.from_numpy(slots.ravel()), _as_index(list(pieces_by_row)), mask)


def _as_index(rows: Sequence[int]) -> Tensor | slice:
    """Rows in a row are not copied."""
    first = rows[0]
    return slice(first, first + len(rows)) if list(rows) == [*range(first, first + len(rows))] else torch.tensor(rows)


def _num_slots(pieces: Sequence[slice]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _read(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """A prompt's tokens, in the model's own precision."""
    folded = _fold(query, keys.shape[1])
    keys, values = (part.to(query.dtype).transpose(0, 1)[None] for part in (keys, values))
    return _unfold(attend(folded, keys, values, mask, scale=scale)[0], len(query))


def _see_run(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Rows that all see all of these tokens: the result (rows, num_heads, head_dim), and the logarithm of the sum of
    the scores' exponentials (rows, num_heads) in float32."""
    folded = _fold(query, len(keys))
    num_queries = folded.shape[2]
    if num_queries == 1 and query.dtype == torch.bfloat16:
        # The kernel takes three times as long for one query as for two.
        folded = folded.expand(-1, -1, 2, -1)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    seen, logsumexp = attention(folded, keys[None], values[None], scale=scale)
    seen, logsumexp = seen[0, :, :num_queries], logsumexp[0, :, :num_queries, None]
    return _unfold(seen, len(query)), _unfold(logsumexp, len(query))[..., 0]


def _see_gathered(
    query: Tensor, keys: Tensor, values: Tensor, part: _Gathered, scale: float, *, mixes: bool
) -> tuple[Tensor, Tensor]:
    """The same, of rows that see each their own, without the logarithms unless it `mixes` with others. The scores are
    written out: the fused kernel takes several times as long for so few."""
    rows, heads = len(query), len(keys)
    keys, values = (
        pages.index_select(1, part.slots).view(heads * rows, -1, pages.shape[2]) for pages in (keys, values)
    )
    # Head by head, as what was gathered.
    grouped = query.unflatten(1, (heads, -1)).transpose(0, 1).flatten(0, 1)
    if rows == 1 and keys.numel() <= _FEW:
        # Half precision's products cost more to begin than so few numbers to copy.
        grouped, keys, values = grouped.float(), keys.float(), values.float()
    scores = torch.baddbmm(grouped.new_zeros(1), grouped, keys.transpose(1, 2), beta=0, alpha=scale)
    if part.mask is not None:
        scores.view(heads, rows, -1, scores.shape[2]).add_(part.mask[:, None])
    seen = torch.bmm(scores.softmax(-1), values).view(heads, rows, -1, values.shape[2])
    logsumexp = scores.float().logsumexp(-1).view(heads, rows, -1) if mixes else seen.new_empty(0)
    return seen.transpose(0, 1).flatten(1, 2), logsumexp.transpose(0, 1).flatten(1) if mixes else logsumexp


def _fold(query: Tensor, num_kv_heads: int) -> Tensor:
    """(tokens, heads, dim) to (1, num_kv_heads, tokens * group, dim): the heads of a group read the same keys."""
    tokens, heads, dim = query.shape
    grouped = query.view(tokens, num_kv_heads, heads // num_kv_heads, dim)
    return grouped.transpose(0, 1).reshape(1, num_kv_heads, -1, dim)


def _unfold(seen: Tensor, tokens: int) -> Tensor:
    """The way back, from (num_kv_heads, tokens * group, dim)."""
    return seen.view(seen.shape[0], tokens, -1, seen.shape[-1]).transpose(0, 1).flatten(1, 2)
