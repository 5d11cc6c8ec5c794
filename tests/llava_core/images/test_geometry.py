"""Tiles and tokens of a picture: the reference's table, and agreement of counting, ordering and cutting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.config import Dialect, MergeType, ModelConfig, SelectFeature, VisionConfig
from llava_core.images.geometry import (
    NEWLINE,
    best_resolution,
    merge_order,
    num_image_tokens,
    scaled_size,
    tile_grid,
    unpadded,
)
from llava_core.types import Size

PINPOINTS = tuple(Size(*pair) for pair in ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))


def config(
    merge: MergeType = "spatial_unpad",
    dialect: Dialect = "original",
    select: SelectFeature = "patch",
    pinpoints: tuple[Size, ...] = PINPOINTS,
    side: int = 336,
) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(side, 14, 8, -2, select, {"model_type": "clip_vision_model"}),
        projector_type="linear",
        projector_bias=True,
        text={"model_type": "llama"},
        hidden_size=8,
        context_length=4096,
        vocab_size=100,
        image_token_id=None,
        eos_token_ids=(2,),
        tie_word_embeddings=False,
        dtype="float32",
        dialect=dialect,
        pinpoints=pinpoints,
        merge_type=merge,
    )


@pytest.mark.parametrize(
    ("side", "select", "expected"),
    [(336, "patch", 576), (224, "patch", 256), (336, "cls_patch", 577), (28, "patch", 4)],
)
def test_one_token_per_patch_and_one_for_the_class(side: int, select: SelectFeature, expected: int) -> None:
    assert num_image_tokens(config("flat", select=select, pinpoints=(), side=side), Size(50, 70)) == expected


@pytest.mark.parametrize(
    ("merge", "pinpoints", "ending"),
    [("spatial_unpad", PINPOINTS, (NEWLINE,)), ("spatial", PINPOINTS, ()), ("flat", PINPOINTS, ()), ("flat", (), ())],
)
def test_an_overview_alone_is_one_tile_with_at_most_one_newline(
    merge: MergeType, pinpoints: tuple[Size, ...], ending: tuple[int, ...]
) -> None:
    of_model = config(merge, pinpoints=pinpoints)
    assert tile_grid(of_model, None) is None
    assert num_image_tokens(of_model, None) == 576 + len(ending)
    assert merge_order(of_model, None) == ((*range(576), *ending) if ending else None)


# Original size, chosen resolution, tiles with the overview, rows and columns of the grid without padding, tokens.
REFERENCE = [
    ((640, 480), (672, 672), 5, (36, 48), 2340),
    ((1024, 768), (672, 672), 5, (36, 48), 2340),
    ((336, 336), (336, 672), 3, (24, 24), 1176),
    ((100, 100), (336, 672), 3, (24, 24), 1176),
    ((1920, 1080), (672, 672), 5, (28, 48), 1948),
    ((1080, 1920), (672, 672), 5, (48, 28), 1968),
    ((3000, 1000), (1008, 336), 4, (24, 72), 2328),
    ((1000, 3000), (336, 1008), 4, (72, 24), 2376),
    ((2000, 500), (1008, 336), 4, (18, 72), 1890),
    ((500, 2000), (336, 1008), 4, (72, 18), 1944),
    ((448, 448), (672, 672), 5, (48, 48), 2928),
    ((1024, 1024), (672, 672), 5, (48, 48), 2928),
    ((1000, 800), (672, 672), 5, (38, 48), 2438),
    ((2544, 3056), (672, 672), 5, (48, 40), 2544),
    ((50, 400), (336, 672), 3, (48, 6), 912),
]


@pytest.mark.parametrize(("given_size", "chosen", "num_tiles", "grid", "tokens"), REFERENCE)
@pytest.mark.parametrize("dialect", ["original", "llava_hf"])
def test_tiles_and_tokens_match_the_references_table(
    given_size: tuple[int, int],
    chosen: tuple[int, int],
    num_tiles: int,
    grid: tuple[int, int],
    tokens: int,
    dialect: Dialect,
) -> None:
    size, model = Size(*given_size), config(dialect=dialect)
    assert best_resolution(size, PINPOINTS) == chosen
    tiles = tile_grid(model, size)
    assert tiles is not None
    assert 1 + tiles.width * tiles.height == num_tiles
    left, top, right, bottom = unpadded(Size(tiles.width * 24, tiles.height * 24), size, dialect)
    assert (bottom - top, right - left) == grid
    assert num_image_tokens(model, size) == tokens


def test_a_tie_goes_to_the_first_candidate() -> None:
    across, down = Size(672, 336), Size(336, 672)
    assert best_resolution(Size(336, 336), (across, down)) == across
    assert best_resolution(Size(336, 336), (down, across)) == down


def test_the_two_dialects_differ_by_rounding_only() -> None:
    # 2379 * (24 / 1189.5) is 48, but floating point gives slightly less or more.
    differing = [
        Size(width, height)
        for width in range(300, 1200, 7)
        for height in range(300, 1200, 11)
        if unpadded(Size(48, 48), Size(width, height), "original")
        != unpadded(Size(48, 48), Size(width, height), "llava_hf")
    ]
    for size in differing:
        theirs, ours = (unpadded(Size(48, 48), size, dialect) for dialect in ("original", "llava_hf"))
        assert abs(sum(theirs) - sum(ours)) <= 1


SIDES = st.integers(1, 3000)


@given(width=SIDES, height=SIDES, merge=st.sampled_from(["flat", "spatial", "spatial_unpad"]), hf=st.booleans())
def test_counting_and_ordering_agree_for_every_size(width: int, height: int, merge: MergeType, *, hf: bool) -> None:
    model, size = config(merge, "llava_hf" if hf else "original"), Size(width, height)
    tiles = tile_grid(model, size)
    assert tiles is not None
    num_rows = 576 * (1 + tiles.width * tiles.height)
    order = merge_order(model, size)
    if order is None:
        assert num_image_tokens(model, size) == num_rows
        return
    rows = [row for row in order if row != NEWLINE]
    assert num_image_tokens(model, size) == len(order)
    assert len(set(rows)) == len(rows)
    assert rows[:576] == list(range(576))
    assert all(0 <= row < num_rows for row in rows)
    if merge == "spatial":
        assert sorted(rows) == list(range(num_rows))


@given(width=SIDES, height=SIDES)
def test_the_scaled_picture_fits_its_resolution_tightly(width: int, height: int) -> None:
    best = best_resolution(Size(width, height), PINPOINTS)
    scaled = scaled_size(Size(width, height), best)
    assert scaled.width == best.width or scaled.height == best.height
    assert 1 <= scaled.width <= best.width
    assert 1 <= scaled.height <= best.height


def test_spatial_merging_reads_tiles_as_one_picture_line_by_line() -> None:
    # Two tiles side by side, each two patches wide: overview 0-3, left 4-7, right 8-11.
    small = config("spatial", pinpoints=(Size(56, 28),), side=28)
    assert merge_order(small, Size(40, 20)) == (0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11)


def test_unpadding_drops_lines_and_ends_the_rest_with_newlines() -> None:
    # Two tiles one above the other. A picture twice as high as wide has no padding; a square one has.
    small = config(pinpoints=(Size(28, 56),), side=28)
    assert merge_order(small, Size(20, 40)) == (0, 1, 2, 3, 4, 5, -1, 6, 7, -1, 8, 9, -1, 10, 11, -1)
    assert merge_order(small, Size(28, 28)) == (0, 1, 2, 3, 6, 7, -1, 8, 9, -1)
