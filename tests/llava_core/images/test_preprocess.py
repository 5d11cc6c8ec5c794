"""Pad, crop and resize equal transformers' processors, up to float rounding, for any size and aspect."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil

from llava_core.images.preprocess import (
    Aspect,
    PreprocessConfig,
    centre_crop,
    pad_to_square,
    preprocess,
    resize_shortest_edge,
)
from llava_core.types import Size
from llava_core.vision.clip import normalise

SIDE = 28


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def ours(image: Image.Image, config: PreprocessConfig) -> npt.NDArray[np.float32]:
    return normalise(torch.from_numpy(preprocess(image, config).copy()), config).numpy()


def theirs(image: Image.Image, *, pad: bool, side: int = SIDE) -> npt.NDArray[np.float32]:
    options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = LlavaImageProcessorPil(do_pad=True, **options) if pad else CLIPImageProcessorPil(**options)
    return np.asarray(processor(image, return_tensors="np")["pixel_values"], np.float32)


@settings(max_examples=60)
@given(width=st.integers(1, 90), height=st.integers(1, 90), pad=st.booleans())
@example(width=337, height=336, pad=False)
@example(width=1, height=90, pad=True)
@example(width=90, height=1, pad=False)
@example(width=28, height=28, pad=False)
@example(width=29, height=28, pad=True)
def test_tiles_equal_those_of_transformers(width: int, height: int, *, pad: bool) -> None:
    image = noise(width, height)
    config = PreprocessConfig(size=SIDE, aspect="pad" if pad else "crop")
    assert np.abs(ours(image, config) - theirs(image, pad=pad)).max() < 1e-4


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(640, 427), (427, 641), (1000, 337), (336, 336)])
def test_the_real_tower_size_equals_transformers(size: tuple[int, int], *, pad: bool) -> None:
    image = noise(*size)
    config = PreprocessConfig(size=336, aspect="pad" if pad else "crop")
    assert np.abs(ours(image, config) - theirs(image, pad=pad, side=336)).max() < 1e-4


def test_tiles_are_uint8_and_square() -> None:
    tiles = preprocess(noise(50, 20), PreprocessConfig(size=SIDE))
    assert (tiles.shape, tiles.dtype) == ((1, SIDE, SIDE, 3), np.uint8)


def test_padding_has_the_mean_colour_and_rounds_its_offset_down() -> None:
    square = np.asarray(pad_to_square(noise(6, 3), PreprocessConfig(size=1).pad_colour))
    assert (square[0] == (122, 116, 104)).all()
    assert (square[1:4] == np.asarray(noise(6, 3))).all()
    assert (square[4:] == (122, 116, 104)).all()


def test_a_picture_of_the_right_size_is_unchanged() -> None:
    image = noise(SIDE, SIDE)
    assert preprocess(image, PreprocessConfig(size=SIDE, aspect="crop"))[0].tobytes() == image.tobytes()
    assert preprocess(image, PreprocessConfig(size=SIDE))[0].tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("aspect", "pixels"),
    [
        ("crop", "82837d85867788847b7b8a82"),
        ("anyres", "7f857b84857a8c7a797d818879857888837786877a82867e86787e7d8485907c737e7d89"),
    ],
)
def test_rows_first_equals_pillow_10_for_a_tall_picture(aspect: Aspect, pixels: str) -> None:
    """The pixels were recorded with Pillow 10.4, which the original code ran on; 13 takes the columns first."""
    rows, columns, channels = np.mgrid[0:17, 0:6, 0:3]
    image = Image.fromarray(((columns * 37 + rows * 59 + channels * 83) % 256).astype(np.uint8))
    pinpoints = (Size(2, 4),) if aspect == "anyres" else ()
    tiles = preprocess(image, PreprocessConfig(size=2, aspect=aspect, pinpoints=pinpoints, rows_first=True))
    assert tiles.tobytes().hex() == pixels


@pytest.mark.parametrize(
    ("size", "scaled"), [((337, 100), (94, 28)), ((100, 337), (28, 94)), ((28, 28), (28, 28)), ((7, 7), (28, 28))]
)
def test_the_longer_side_is_rounded_down(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    assert resize_shortest_edge(noise(*size), SIDE, Image.Resampling.BICUBIC).size == scaled


def test_the_centre_is_cropped() -> None:
    image = noise(33, 28)
    assert centre_crop(image, 28).tobytes() == image.crop((2, 0, 30, 28)).tobytes()


def test_only_rgb_is_accepted() -> None:
    with pytest.raises(ValueError, match="not L"):
        preprocess(Image.new("L", (5, 5)), PreprocessConfig(size=SIDE))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        PreprocessConfig(size=0)
    with pytest.raises(ValueError, match="'stretch'"):
        PreprocessConfig(size=1, aspect="stretch")  # type: ignore[arg-type]
