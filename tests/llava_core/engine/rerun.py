"""A backend whose recordings rerun the step on the same tensors: tests the code around graphs without a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from llava_core.engine.attention import PagedCache, ReferenceBackend, slots_on_device


class RerunBackend(ReferenceBackend):
    """Logs the number of rows of each recording and each replay."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []

    def decode_batch(self, cache: PagedCache, positions: Tensor, table: Tensor) -> "PlainDecodeBatch":
        return PlainDecodeBatch(cache, positions, table)

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        out = step().clone()
        self.recorded.append(len(out))

        def replay() -> Tensor:
            self.replayed.append(len(out))
            # Like a graph, it writes to the same memory every time.
            return out.copy_(step())

        return replay


class PlainDecodeBatch:
    """Gathers every block in the tables and masks what does not belong to a row."""

    def __init__(self, cache: PagedCache, positions: Tensor, table: Tensor) -> None:
        self._cache, self._positions, self._table = cache, positions, table
        self._slots = slots_on_device(positions, table, cache.shape.block_size)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self._cache.write(layer, self._slots, key, value)
        places = torch.arange(self._table.shape[1] * self._cache.shape.block_size)
        seen = places <= self._positions[:, None]
        if window is not None:
            seen &= places > self._positions[:, None] - window
        groups = query.shape[1] // self._cache.shape.num_heads
        keys, values = (
            pages[layer][self._table].flatten(1, 2).masked_fill(~seen[..., None, None], 0).repeat_interleave(groups, 2)
            for pages in (self._cache.keys, self._cache.values)
        )
        scores = torch.einsum("rhd,rkhd->rhk", query, keys) * scale
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        return torch.einsum("rhk,rkhd->rhd", weights, values)
