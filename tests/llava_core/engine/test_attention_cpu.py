"""The CPU's attention against the reference and the definition, on any mixture of prompts and answers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.engine import attention_cpu
from llava_core.engine.attention import ReferenceBackend, Span
from llava_core.engine.attention_cpu import CpuBackend, find_runs
from tests.llava_core.engine.packed import SCALE, Layout, Packed, layouts

windows = st.none() | st.integers(1, 20)
# Two answers on common blocks, a prompt, one that has just begun.
MIXED = Layout(3, 2, 3, 8, ((8, 1, 0), (9, 1, 2), (4, 5, 1), (0, 1, 0)), 1, is_scattered=True, seed=1)


@given(layout=layouts(), window=windows)
def test_it_equals_reference_and_definition(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    seen = packed.attend(CpuBackend(), window)
    torch.testing.assert_close(seen, packed.attend(ReferenceBackend(), window), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen, packed.expected(window), atol=1e-5, rtol=1e-5)


@given(layout=layouts(), window=windows)
def test_a_model_in_half_precision_gets_nearly_the_same(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    seen = packed.attend(CpuBackend(), window, dtype=torch.bfloat16)
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen.float(), packed.expected(window), atol=0.05, rtol=0.05)


@given(layout=layouts(), window=windows)
def test_what_is_not_a_requests_own_changes_not_a_bit(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    clean, dirty = (packed.attend(CpuBackend(), window, garbage=value) for value in (0.0, torch.nan))
    assert torch.equal(clean, dirty)


@given(layout=layouts(), window=windows, long=st.integers(1, 20), few=st.sampled_from([0, 2**17]))
def test_what_counts_as_long_or_few_changes_nothing(layout: Layout, window: int | None, long: int, few: int) -> None:
    packed = Packed(layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_cpu, "_LONG", long)
        patch.setattr(attention_cpu, "_LONG_ALONE", 2 * long)
        patch.setattr(attention_cpu, "_FEW", few)
        seen, half = packed.attend(CpuBackend(), window), packed.attend(CpuBackend(), window, dtype=torch.bfloat16)
    torch.testing.assert_close(seen, packed.expected(window), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half.float(), packed.expected(window), atol=0.05, rtol=0.05)


@given(lengths=st.lists(st.integers(1, 5000), max_size=40))
def test_lines_gathered_together_are_short_or_at_most_twice_as_long_as_each_other(lengths: list[int]) -> None:
    groups = attention_cpu._alike({row: [slice(7, 7 + length)] for row, length in enumerate(lengths)})
    assert sorted(row for group in groups for row in group) == [*range(len(lengths))]
    for group in groups:
        assert list(group) == sorted(group)
        own = [lengths[row] for row in group]
        assert max(own) <= max(256, 2 * min(own))


def test_lines_in_half_precision_grow_seldom_and_a_line_of_ones_own_is_as_long_as_it_must_be() -> None:
    def width(dtype: torch.dtype, *lengths: int) -> int:
        pieces = {row: [slice(0, length)] for row, length in enumerate(lengths)}
        return attention_cpu._gather(pieces, dtype).slots.numel() // len(lengths)

    assert [width(torch.bfloat16, 5, length) for length in (5, 32, 33, 64)] == [32, 32, 64, 64]
    assert width(torch.bfloat16, 33) == 33
    assert width(torch.float32, 5, 33) == 33


def test_a_damaged_request_damages_no_other() -> None:
    packed = Packed(replace(MIXED, requests=((8, 1, 0), (9, 1, 0), (4, 5, 0), (0, 1, 0))))
    healthy = packed.attend(CpuBackend())
    packed.keys[1][0] = torch.nan
    packed.values[2][0] = torch.nan
    seen = packed.attend(CpuBackend())
    assert torch.equal(seen[[0, 7]], healthy[[0, 7]])
    assert seen[1:7].isnan().any(-1).all()


def test_layers_with_and_without_a_window_share_a_batch() -> None:
    packed = Packed(MIXED)
    batch = CpuBackend().batch(packed.cache(), packed.spans)
    key, value = (
        torch.cat([part[-span.num_queries :] for part, span in zip(parts, packed.spans, strict=True)])
        for parts in (packed.keys, packed.values)
    )
    for window in (None, 4, None, 2):
        seen = batch.attend(0, packed.query, key, value, SCALE, window)
        torch.testing.assert_close(seen, packed.expected(window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_scores_far_apart_are_mixed_without_overflow(factor: float) -> None:
    packed = Packed(MIXED)
    packed.query *= factor
    torch.testing.assert_close(packed.attend(CpuBackend()), packed.expected(), atol=1e-4, rtol=1e-4)


def test_half_precisions_are_kept_where_processors_compute_in_them() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert [CpuBackend().cache_dtype(dtype) for dtype in dtypes] == [torch.bfloat16, torch.float32, torch.float32]


def runs(spans: dict[int, Span], window: int | None = None) -> list[tuple[int, int, list[int]]]:
    return [(slots.start, slots.stop, rows) for slots, rows in find_runs(spans, 4, window)]


def test_blocks_side_by_side_are_one_run() -> None:
    assert runs({0: Span(1, 10, [3, 4, 5])}) == [(12, 22, [0])]


def test_blocks_apart_are_runs_of_their_own_in_the_order_they_lie() -> None:
    assert runs({0: Span(1, 10, [5, 3, 0])}) == [(0, 2, [0]), (12, 16, [0]), (20, 24, [0])]


def test_neighbours_in_memory_are_merged_whatever_their_order_in_the_text() -> None:
    assert runs({0: Span(1, 12, [4, 3, 5])}) == [(12, 24, [0])]


def test_a_run_ends_where_other_rows_see_it() -> None:
    spans = {2: Span(1, 10, [0, 1, 2]), 5: Span(1, 11, [0, 1, 3])}
    assert runs(spans) == [(0, 8, [2, 5]), (8, 10, [2]), (12, 15, [5])]


def test_neighbours_of_two_requests_are_not_merged() -> None:
    assert runs({0: Span(1, 8, [0, 1]), 1: Span(1, 8, [2, 3])}) == [(0, 8, [0]), (8, 16, [1])]


def test_a_block_that_is_not_full_ends_a_run_only_where_it_ends() -> None:
    assert runs({0: Span(1, 6, [1, 0])}) == [(0, 2, [0]), (4, 8, [0])]
    assert runs({0: Span(1, 6, [0, 1])}) == [(0, 6, [0])]


def test_a_window_leaves_out_what_is_too_long_ago() -> None:
    assert runs({0: Span(1, 10, [0, 1, 2])}, window=3) == [(7, 10, [0])]
    assert runs({0: Span(1, 10, [0, 1, 2])}, window=2) == [(8, 10, [0])]
    assert runs({0: Span(1, 10, [0, 1, 2])}, window=99) == [(0, 10, [0])]


def test_requests_whose_windows_begin_apart_share_no_run_there() -> None:
    spans = {0: Span(1, 9, [0, 1, 2]), 1: Span(1, 10, [0, 1, 3])}
    assert runs(spans, window=5) == [(4, 8, [0]), (5, 8, [1]), (8, 9, [0]), (12, 14, [1])]


def test_blocks_that_were_taken_ahead_are_not_read() -> None:
    assert runs({0: Span(1, 4, [0, 1, 2])}) == [(0, 4, [0])]
