"""Paged attention: the reference against the definition on unpaged keys; slots, masks, the transformers interface."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface

from llava_core.engine.attention import (
    NAME,
    CacheShape,
    PagedCache,
    ReferenceBackend,
    Span,
    slots_of,
    table_of,
    visible,
)
from tests.llava_core.engine.packed import Layout, Packed, layouts

CPU = torch.device("cpu")
windows = st.none() | st.integers(1, 20)


@given(layout=layouts(), window=windows)
def test_the_reference_equals_softmax_over_own_tokens(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    torch.testing.assert_close(packed.attend(ReferenceBackend(), window), packed.expected(window), atol=1e-5, rtol=1e-5)


def test_the_output_has_the_models_half_precision() -> None:
    packed = Packed(Layout(3, 2, 2, 8, ((5, 1, 0), (2, 4, 0)), 0, is_scattered=True, seed=0))
    seen = packed.attend(ReferenceBackend(), dtype=torch.bfloat16)
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen.float(), packed.expected(), atol=0.03, rtol=0.03)


def test_slots_are_of_the_last_tokens_in_order() -> None:
    spans = [Span(3, 5, [7, 2, 0]), Span(1, 4, [1, 3])]
    assert slots_of(spans, 2) == [4, 5, 0, 7]


def test_a_table_is_as_wide_as_the_longest_text() -> None:
    spans = [Span(1, 5, [7, 2, 0, 9]), Span(1, 2, [1, 3]), Span(1, 1, [4])]
    assert table_of(spans, 2).tolist() == [[7, 2, 0], [1, 3, 0], [4, 0, 0]]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (None, ["111..", "1111.", "11111"]),
        (2, [".11..", "..11.", "...11"]),
        (1, ["..1..", "...1.", "....1"]),
        (9, ["111..", "1111.", "11111"]),
    ],
)
def test_a_token_sees_earlier_tokens_within_the_window(window: int | None, expected: list[str]) -> None:
    drawn = ["".join("1" if seen else "." for seen in row) for row in visible(3, 5, window, CPU).tolist()]
    assert drawn == expected


def test_a_layer_writes_only_the_given_slots_of_its_own_pages() -> None:
    cache = PagedCache(CacheShape(2, 3, 4, 1, 2), torch.float64, CPU)
    for pages in (*cache.keys, *cache.values):
        pages.zero_()
    new = torch.arange(1.0, 7).view(3, 1, 2)
    cache.write(1, torch.tensor([11, 0, 6]), new, -new)
    assert not cache.keys[0].any()
    assert not cache.values[0].any()
    assert cache.keys[1].flatten(0, 1)[[11, 0, 6]].tolist() == new.tolist()
    assert cache.values[1][2, 3].tolist() == [[-1.0, -2.0]]
    assert int(cache.keys[1].count_nonzero()) == 6


class Recorder:
    """A batch that records its last call."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self.asked = (layer, query.shape, key.shape, value.shape, scale, window)
        return query * 2


def call(batch: Recorder, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    query = torch.randn(1, 6, 5, 4)
    forward = AttentionInterface()[NAME]
    seen, weights = forward(
        SimpleNamespace(layer_idx=3),
        query,
        torch.randn(1, 2, 5, 4),
        torch.randn(1, 2, 5, 4),
        mask,
        scaling=0.5,
        paged=batch,
        sliding_window=7,
    )
    assert weights is None
    return query, seen


def test_transformers_finds_attention_by_name_with_tokens_first() -> None:
    batch = Recorder()
    query, seen = call(batch)
    assert batch.asked == (3, (5, 6, 4), (5, 2, 4), (5, 2, 4), 0.5, 7)
    torch.testing.assert_close(seen, query.transpose(1, 2) * 2)


def test_a_mask_from_transformers_is_refused() -> None:
    with pytest.raises(AssertionError, match="does its own masking"):
        call(Recorder(), torch.zeros(1, 1, 5, 5))


@pytest.mark.parametrize("heads_first", [False, True])
def test_slots_index_the_memory_of_blocks_in_order(*, heads_first: bool) -> None:
    cache = PagedCache(CacheShape(2, 3, 4, 2, 2), torch.float32, CPU, heads_first=heads_first)
    new = torch.arange(4.0).view(1, 2, 2)
    cache.write(1, torch.tensor([9]), new, new + 10)
    assert torch.equal(cache.keys[1][2, 1], new[0])
    assert torch.equal(cache.values[1][2, 1], new[0] + 10)
    assert float(cache.keys[0].abs().sum()) == 0
    keys, values = cache.slots[1]
    assert torch.equal(keys[9], new[0])
    assert torch.equal(values[9], new[0] + 10)
