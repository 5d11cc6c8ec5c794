"""Turns the projected rows of a picture's tiles into one sequence of tokens: ordered, without padding, lines ended.

images/geometry.py decides which row goes where; this is the gather. Knows nothing about prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_core.images.geometry import NEWLINE


def merge_tiles(rows: Tensor, order: Sequence[int] | None, newline: Tensor | None) -> Tensor:
    """`rows` (rows of all tiles, hidden) in the given order, (len(order), hidden); NEWLINE stands for `newline`.

    With order None the rows are unchanged. Raises ValueError when the order names rows or a newline that do not exist.
    """
    if order is None:
        return rows
    if max(order) >= len(rows) or (newline is None and NEWLINE in order):
        raise ValueError(f"{len(rows)} rows, and {'no' if newline is None else 'a'} newline, do not fit the order")
    source = rows if newline is None else torch.cat([rows, newline[None].to(rows.dtype)])
    return source[torch.tensor(order, device=rows.device)]
