"""Which parts of a paged cache a CPU reads for requests that have one token in a step, and by how many calls.

A contiguous part that several requests share is read once for all of them. Knows where keys and values are and which
rows see them, but not their contents.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llava_core.engine.attention import Span, table_of

# Each part is a call, and two parts have to be mixed, which costs as much as copying about this many tokens: per
# request where several share the part, and for one request alone.
_LONG = 256
_LONG_ALONE = 1024
# Half-precision products are set up anew for each new shape, which takes longer than the product itself: lines grow in
# steps of this size.
_GROWTH = 32


@dataclass(frozen=True)
class Run:
    """Tokens that are contiguous in the cache, and the `rows` of the batch that see all of them."""

    slots: slice
    rows: Tensor | slice


@dataclass(frozen=True)
class Gathered:
    """For each of `rows` as many `slots` as the longest row has. `mask` (rows, longest) hides the padding, which also
    consists of the row's own slots."""

    slots: Tensor
    rows: Tensor | slice
    mask: Tensor | None


@dataclass
class Plan:
    """Which parts of the cache are read, and how their results are combined. With the parts' results stacked as lines,
    `table` has for each of `rows` the numbers of its own lines, padded with the number of an empty line at the end. It
    is None where each row has one line, in the order of `rows`."""

    runs: list[Run] = field(default_factory=list)
    gathered: list[Gathered] = field(default_factory=list)
    rows: Tensor | slice = field(default_factory=lambda: slice(0))
    table: Tensor | None = None


@dataclass(frozen=True)
class BlockTable:
    """For each of `rows`, its request's `blocks` as from `table_of`, and its token count: `lengths` int64 (rows,)."""

    blocks: Tensor
    lengths: Tensor
    rows: Tensor | slice


def block_table(spans: Mapping[int, Span], block_size: int) -> BlockTable:
    """The block table of requests by row."""
    lengths = torch.tensor([span.length for span in spans.values()])
    return BlockTable(table_of(spans.values(), block_size), lengths, _as_index(list(spans)))


def find_runs(spans: dict[int, Span], block_size: int, window: int | None) -> list[tuple[slice, list[int]]]:
    """Contiguous slots that are seen by the same rows of a batch; `spans` are by row, of one query each."""
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


def plan_reads(found: list[tuple[slice, list[int]]], dtype: torch.dtype) -> Plan:
    """Decide what is read in place and what is gathered, for queries in `dtype`."""
    plan, lines = Plan(), list[int]()
    parts = Counter(row for _, rows in found for row in rows)
    short: defaultdict[int, list[slice]] = defaultdict(list)
    for slots, rows in found:
        is_whole = len(rows) == 1 and parts[rows[0]] == 1
        is_all = is_whole and len(parts) == 1
        if is_all or slots.stop - slots.start >= (_LONG if is_whole or len(rows) > 1 else _LONG_ALONE):
            plan.runs.append(Run(slots, _as_index(rows)))
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
    """Groups of rows to gather together: lines are padded to the longest, so their lengths must not differ much."""
    groups, shortest = list[dict[int, list[slice]]](), 0
    for row, pieces in sorted(short.items(), key=lambda item: _num_slots(item[1])):
        length = _num_slots(pieces)
        if not groups or length > max(_LONG, 2 * shortest):
            groups.append({})
            shortest = length
        groups[-1][row] = pieces
    return [dict(sorted(group.items())) for group in groups]


def _gather(pieces_by_row: Mapping[int, list[slice]], dtype: torch.dtype) -> Gathered:
    lengths = [_num_slots(pieces) for pieces in pieces_by_row.values()]
    longest = max(lengths)
    if len(lengths) > 1 and dtype == torch.bfloat16:
        longest += -longest % _GROWTH
    slots = np.empty((len(lengths), longest), dtype=np.int64)
    for line, pieces in zip(slots, pieces_by_row.values(), strict=True):
        # Masked slots must be the row's own: another request's values may be NaN.
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
    return Gathered(torch.from_numpy(slots.ravel()), _as_index(list(pieces_by_row)), mask)


def _as_index(rows: Sequence[int]) -> Tensor | slice:
    """The rows as an index: a slice, which needs no copy, where they are consecutive."""
    first = rows[0]
    return slice(first, first + len(rows)) if list(rows) == [*range(first, first + len(rows))] else torch.tensor(rows)


def _num_slots(pieces: Sequence[slice]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)
