"""Decode steps recorded once and replayed: a step of one token per request is some hundreds of small operations, which
take longer to launch on a GPU than to run.

A graph has a fixed number of rows and reads its inputs from one sheet of integers: each row's token, its position, and
the blocks of its request. A step uses the smallest graph that it fits into; surplus rows write to a spare block, which
belongs to no request. Knows neither how a step is recorded nor what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

# Turns a step, which always reads and writes the same tensors, into a function that replays it.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
_TOKEN, _POSITION, _BLOCKS = 0, 1, 2


@dataclass(frozen=True)
class DecodeRow:
    """One request's part in a step: a token, its position, and the blocks up to it."""

    token: int
    position: int
    blocks: Sequence[int]


class DecodeGraphs:
    """`decode` computes logits (rows, vocab) from a sheet. All graphs are recorded up front, so that no step waits."""

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        record: Record,
        *,
        max_rows: int,
        max_blocks: int,
        spare_block: int,
        device: torch.device,
    ) -> None:
        self._idle = torch.tensor([0, 0, *[spare_block] * max_blocks])
        sheet = self._idle.repeat(max_rows, 1)
        # Only pinned memory is copied asynchronously. It is written to again only after the step's results have been
        # read.
        self._sheet = sheet.pin_memory() if device.type == "cuda" else sheet
        self._on_device = self._sheet.to(device, copy=True)
        self._sizes = batch_sizes(max_rows)
        # The largest first: the others can reuse its memory.
        with torch.inference_mode():
            self._replays = {size: record(partial(decode, self._on_device[:size])) for size in reversed(self._sizes)}

    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Logits (rows, vocab), valid until the next call."""
        size = next(size for size in self._sizes if size >= len(rows))
        sheet = self._sheet.numpy()
        for line, row in zip(sheet, rows, strict=False):
            line[_TOKEN], line[_POSITION] = row.token, row.position
            line[_BLOCKS : _BLOCKS + len(row.blocks)] = row.blocks
        self._sheet[len(rows) : size] = self._idle
        self._on_device[:size].copy_(self._sheet[:size], non_blocking=True)
        return self._replays[size]()[: len(rows)]


def unpack_sheet(sheet: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (rows,), positions (rows,) and blocks (rows, max_blocks) of a sheet."""
    return sheet[:, _TOKEN], sheet[:, _POSITION], sheet[:, _BLOCKS:]


def batch_sizes(max_rows: int) -> list[int]:
    """Powers of two up to `max_rows`, and `max_rows` itself."""
    return [*(2**power for power in range((max_rows - 1).bit_length())), max_rows]
