"""Batches: padding, ignored labels, and the attention mask, against its rule spelled out cell by cell."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.prompts.tokenize import IGNORE_LABEL
from llava_core.training.collate import Example, collate, visibility
from llava_core.training.packing import Packed


def example(length: int, num_images: int = 0) -> Example:
    ids = tuple(range(10, 10 + length))
    packed = Packed(ids, ids, tuple(range(length)), (0,) * length)
    return {"tokens": packed, "images": torch.full((num_images, 4, 3), float(length))}


def test_shorter_examples_are_padded_on_the_right() -> None:
    batch = collate([example(2), example(4)])
    assert batch["ids"].tolist() == [[10, 11, 0, 0], [10, 11, 12, 13]]
    assert batch["labels"].tolist() == [[10, 11, IGNORE_LABEL, IGNORE_LABEL], [10, 11, 12, 13]]
    assert batch["positions"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5), (64, 64)])
def test_lengths_are_rounded_up_to_a_multiple(multiple: int, length: int) -> None:
    assert collate([example(5)], multiple_of=multiple)["ids"].shape == (1, length)


def test_features_follow_the_order_of_their_placeholders() -> None:
    batch = collate([example(2, 1), example(3), example(4, 2)])
    assert batch["images"][:, 0, 0].tolist() == [2, 4, 4]


def test_padding_is_seen_only_by_padding() -> None:
    mask = collate([example(2), example(4)])["mask"][0, 0]
    assert mask[2:].tolist() == [[False, False, True, False], [False, False, True, True]]
    assert not mask[:2, 2:].any()


@given(st.lists(st.lists(st.integers(-1, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_a_token_sees_the_shared_prefix_and_its_own_block_up_to_itself(blocks: list[list[int]]) -> None:
    mask = visibility(torch.tensor(blocks))
    assert mask.shape == (len(blocks), 1, 6, 6)
    for row, numbers in enumerate(blocks):
        for at in range(6):
            for other in range(6):
                shares = numbers[at] == numbers[other] or (numbers[other] == 0 and numbers[at] >= 0)
                assert bool(mask[row, 0, at, other]) == (other <= at and shares)


def test_every_token_sees_at_least_itself() -> None:
    mask = collate([example(1), example(7)], multiple_of=8)["mask"]
    assert mask.any(-1).all()
