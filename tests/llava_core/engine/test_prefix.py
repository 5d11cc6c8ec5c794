"""Block keys: equal exactly if everything up to the block's end is equal, pictures included."""

from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.engine.prefix import ImageSpan, next_key
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import Size

SMALL, LARGE = Size(40, 30), Size(80, 60)
# The number of a picture's tokens is determined by its content and its size.
PICTURES = {("cat", SMALL): 3, ("cat", LARGE): 5, ("cat", None): 3, ("dog", SMALL): 3, ("dog", LARGE): 5}
Picture = tuple[str, Size | None]
# A prompt consists of words of one token each, and of pictures.
Part = int | Picture


def lay_out(parts: Sequence[Part]) -> tuple[list[int], list[ImageSpan]]:
    tokens: list[int] = []
    images: list[ImageSpan] = []
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
        else:
            images.append(ImageSpan(len(tokens), len(tokens) + PICTURES[part], *part))
            tokens += [IMAGE_TOKEN_ID] * PICTURES[part]
    return tokens, images


def keys(parts: Sequence[Part], block_size: int) -> list[bytes]:
    """Returns the keys of all full blocks."""
    tokens, images = lay_out(parts)
    found = [b""]
    for start in range(0, len(tokens) - block_size + 1, block_size):
        found.append(next_key(found[-1], tokens, start, images, block_size=block_size))
    return found[1:]


def content(parts: Sequence[Part], block_size: int) -> list[list[object]]:
    """Returns what the keys stand for: for each full block, everything up to its end, token by token."""
    cells = [
        cell
        for part in parts
        for cell in ([part] if isinstance(part, int) else [(part, row) for row in range(PICTURES[part])])
    ]
    return [cells[:stop] for stop in range(block_size, len(cells) + 1, block_size)]


part = st.sampled_from([1, 2]) | st.sampled_from(sorted(PICTURES, key=repr))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[Part], list[Part]]:
    """Draws two prompts, often identical except for one part."""
    first = draw(st.lists(part, min_size=1, max_size=8))
    place = draw(st.integers(0, len(first) - 1))
    middle = draw(st.lists(part, max_size=2))
    return first, [*first[:place], *middle, *first[place + draw(st.integers(0, 1)) :]]


@given(pair=pairs(), block_size=st.integers(1, 6))
def test_keys_are_equal_exactly_if_everything_up_to_the_end_is(
    pair: tuple[list[Part], list[Part]], block_size: int
) -> None:
    keyed = [known for parts in pair for known in zip(keys(parts, block_size), content(parts, block_size), strict=True)]
    for (one, held), (other, there) in combinations(keyed, 2):
        assert (one == other) == (held == there)


@pytest.mark.parametrize("other", [("dog", LARGE), ("cat", SMALL)])
@pytest.mark.parametrize(("offset", "block_size"), [(o, size) for size in (1, 2, 3, 4, 5, 8) for o in range(2 * size)])
def test_another_picture_shares_only_the_blocks_before_it(offset: int, block_size: int, other: Picture) -> None:
    before, after = [7] * offset, [8] * 9
    one = keys([*before, ("cat", LARGE), *after], block_size)
    # Padded to the same length, so that all tokens are the same.
    gap = [IMAGE_TOKEN_ID] * (5 - PICTURES[other])
    another = keys([*before, other, *gap, *after], block_size)
    assert len(one) == len(another)
    shared = [mine == theirs for mine, theirs in zip(one, another, strict=True)]
    assert shared == [(index + 1) * block_size <= offset for index in range(len(one))]


def test_the_order_of_two_pictures_in_a_block_matters() -> None:
    cat, dog = ("cat", SMALL), ("dog", SMALL)
    orders = [[7, *order, 8] for order in product((cat, dog), repeat=2)]
    assert len({tuple(keys(parts, 8)) for parts in orders}) == 4


def test_the_boundary_between_two_pictures_matters() -> None:
    small_first = [("cat", SMALL), ("cat", LARGE)]
    assert keys(small_first, 8) != keys(small_first[::-1], 8)


def test_the_start_of_a_picture_that_begins_before_the_block_matters() -> None:
    tokens = [IMAGE_TOKEN_ID] * 8
    spans = [ImageSpan(start, 8, "cat", SMALL) for start in range(4)]
    assert len({next_key(b"", tokens, 4, [span], block_size=4) for span in spans}) == 4


def test_a_picture_outside_the_block_does_not_matter() -> None:
    tokens = [*range(4), *[IMAGE_TOKEN_ID] * 4, *range(4)]
    beside = [ImageSpan(4, 8, "cat", SMALL)]
    for start in (0, 8):
        assert next_key(b"p", tokens, start, beside, block_size=4) == next_key(b"p", tokens, start, [], block_size=4)


def test_a_key_depends_on_everything_before() -> None:
    tokens = list(range(12))
    plain = keys(tokens, 3)
    for place in range(12):
        changed = keys([*tokens[:place], 99, *tokens[place + 1 :]], 3)
        assert [one == other for one, other in zip(plain, changed, strict=True)] == [
            index < place // 3 for index in range(4)
        ]


def test_lists_and_tuples_have_the_same_key() -> None:
    image = ImageSpan(1, 3, "cat", SMALL)
    key = next_key(b"", [5, -200, -200, 6], 0, [image], block_size=4)
    assert next_key(b"", (5, -200, -200, 6, 7), 0, (image,), block_size=4) == key
