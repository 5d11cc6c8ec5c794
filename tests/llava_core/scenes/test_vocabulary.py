"""The drawn world's words: no two colours can be confused, and nothing is listed twice."""

import itertools
import math

from llava_core.scenes.vocabulary import COLOURS, DIGITS, LETTERS, PLACES, PRINTED_WORDS, SHAPES, SIZES

# The most that drawing adds to or subtracts from a channel.
JITTER = 9


def test_colours_stay_distinct_even_at_their_closest() -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        distance = min(math.dist(a, b) for a in COLOURS[one] for b in COLOURS[other])
        assert distance > 2 * JITTER * math.sqrt(3), (one, other)


def test_names_are_unique() -> None:
    for names in (SHAPES, PRINTED_WORDS, list(itertools.chain(*PLACES))):
        assert len(set(names)) == len(names)


def test_places_are_a_grid_of_three_by_three() -> None:
    assert [len(row) for row in PLACES] == [3, 3, 3]


def test_sizes_are_ordered_without_overlap() -> None:
    assert SIZES["small"][1] <= SIZES["medium"][0] < SIZES["medium"][1] <= SIZES["large"][0]


def test_printed_words_are_capitals_and_short() -> None:
    assert all(set(word) <= set(LETTERS) and len(word) <= 5 for word in PRINTED_WORDS)
    assert len(LETTERS) == 26
    assert len(DIGITS) == 10
