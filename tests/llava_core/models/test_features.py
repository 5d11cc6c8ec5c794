"""Tiles become one row of tokens: the gather follows the given order and refuses an order that does not fit."""

import pytest
import torch

from llava_core.images.geometry import NEWLINE
from llava_core.models.features import merge_tiles

ROWS = torch.arange(8.0).view(4, 2)
END = torch.tensor([9.0, 9.0])


def test_without_an_order_rows_are_unchanged() -> None:
    assert merge_tiles(ROWS, None, END) is ROWS


def test_rows_follow_the_order_with_newlines_inserted() -> None:
    got = merge_tiles(ROWS, (2, 0, NEWLINE, 3, NEWLINE), END)
    assert got.tolist() == [[4, 5], [0, 1], [9, 9], [6, 7], [9, 9]]


def test_the_newline_is_cast_to_the_rows_dtype() -> None:
    assert merge_tiles(ROWS.to(torch.bfloat16), (NEWLINE,), END).dtype == torch.bfloat16


@pytest.mark.parametrize(("order", "newline"), [((4,), END), ((0, NEWLINE), None)])
def test_an_order_that_does_not_fit_is_refused(order: tuple[int, ...], newline: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="4 rows"):
        merge_tiles(ROWS, order, newline)
