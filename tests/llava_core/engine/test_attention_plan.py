"""The attention plan: which runs of blocks are read in place, which rows see them, and which rows are gathered."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.engine.attention import Span
from llava_core.engine.attention_plan import _alike, _gather, find_runs


@given(lengths=st.lists(st.integers(1, 5000), max_size=40))
def test_rows_gathered_together_have_similar_lengths(lengths: list[int]) -> None:
    groups = _alike({row: [slice(7, 7 + length)] for row, length in enumerate(lengths)})
    assert sorted(row for group in groups for row in group) == [*range(len(lengths))]
    for group in groups:
        assert list(group) == sorted(group)
        own = [lengths[row] for row in group]
        assert max(own) <= max(256, 2 * min(own))


def test_only_shared_half_precision_rows_are_padded() -> None:
    def width(dtype: torch.dtype, *lengths: int) -> int:
        pieces = {row: [slice(0, length)] for row, length in enumerate(lengths)}
        return _gather(pieces, dtype).slots.numel() // len(lengths)

    assert [width(torch.bfloat16, 5, length) for length in (5, 32, 33, 64)] == [32, 32, 64, 64]
    assert width(torch.bfloat16, 33) == 33
    assert width(torch.float32, 5, 33) == 33


def runs(spans: dict[int, Span], window: int | None = None) -> list[tuple[int, int, list[int]]]:
    return [(slots.start, slots.stop, rows) for slots, rows in find_runs(spans, 4, window)]


def test_adjacent_blocks_form_one_run() -> None:
    assert runs({0: Span(1, 10, [3, 4, 5])}) == [(12, 22, [0])]


def test_separate_blocks_are_separate_runs_in_memory_order() -> None:
    assert runs({0: Span(1, 10, [5, 3, 0])}) == [(0, 2, [0]), (12, 16, [0]), (20, 24, [0])]


def test_neighbours_in_memory_merge_in_any_text_order() -> None:
    assert runs({0: Span(1, 12, [4, 3, 5])}) == [(12, 24, [0])]


def test_a_run_ends_where_the_set_of_rows_changes() -> None:
    spans = {2: Span(1, 10, [0, 1, 2]), 5: Span(1, 11, [0, 1, 3])}
    assert runs(spans) == [(0, 8, [2, 5]), (8, 10, [2]), (12, 15, [5])]


def test_neighbours_of_two_requests_are_not_merged() -> None:
    assert runs({0: Span(1, 8, [0, 1]), 1: Span(1, 8, [2, 3])}) == [(0, 8, [0]), (8, 16, [1])]


def test_a_partial_block_ends_a_run_at_its_last_token() -> None:
    assert runs({0: Span(1, 6, [1, 0])}) == [(0, 2, [0]), (4, 8, [0])]
    assert runs({0: Span(1, 6, [0, 1])}) == [(0, 6, [0])]


def test_a_window_leaves_out_older_tokens() -> None:
    assert runs({0: Span(1, 10, [0, 1, 2])}, window=3) == [(7, 10, [0])]
    assert runs({0: Span(1, 10, [0, 1, 2])}, window=2) == [(8, 10, [0])]
    assert runs({0: Span(1, 10, [0, 1, 2])}, window=99) == [(0, 10, [0])]


def test_requests_share_no_run_where_their_windows_start_apart() -> None:
    spans = {0: Span(1, 9, [0, 1, 2]), 1: Span(1, 10, [0, 1, 3])}
    assert runs(spans, window=5) == [(4, 8, [0]), (5, 8, [1]), (8, 9, [0]), (12, 14, [1])]


def test_preallocated_blocks_are_not_read() -> None:
    assert runs({0: Span(1, 4, [0, 1, 2])}) == [(0, 4, [0])]
