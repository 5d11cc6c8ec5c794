"""Radiographs: contrast, resize and crop equal a plain restatement at any depth; half pixels are rounded to even."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_core.images.biovil import BioVilPreprocessConfig, preprocess_biovil, stretch_contrast


def noise(shape: tuple[int, ...], seed: int = 0, low: int = 40, high: int = 200) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(low, high, shape, np.uint8)


def restated(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    floating = values.astype(float)
    floating = floating - floating.min()
    floating = floating / floating.max()
    return (floating * 255).astype(np.uint8)


@settings(max_examples=50)
@given(low=st.integers(0, 254), span=st.integers(1, 255), seed=st.integers(0, 99), is_rgb=st.booleans())
@example(low=0, span=255, seed=0, is_rgb=True)
def test_contrast_equals_the_restatement(low: int, span: int, seed: int, *, is_rgb: bool) -> None:
    high = min(low + span, 255)
    values = np.random.default_rng(seed).integers(low, high + 1, (9, 7, 3) if is_rgb else (9, 7)).astype(np.uint8)
    values.flat[:2] = low, high
    assert (np.asarray(stretch_contrast(Image.fromarray(values))) == restated(values)).all()


def test_twelve_bits_in_sixteen_are_stretched_to_the_full_range() -> None:
    values = np.random.default_rng(0).integers(100, 4096, (20, 30)).astype(np.uint16)
    stretched = stretch_contrast(Image.fromarray(values))
    assert stretched.mode == "L"
    assert (np.asarray(stretched) == restated(values)).all()
    assert np.asarray(stretched).max() == 255


def test_channels_are_stretched_together_before_becoming_grey() -> None:
    values = noise((8, 8, 3))
    expected = Image.fromarray(restated(values)).convert("L")
    got = preprocess_biovil(Image.fromarray(values), BioVilPreprocessConfig(resize=8, size=8))
    assert (got[0, :, :, 0] == np.asarray(expected)).all()


def test_grey_and_its_rgb_copy_give_the_same_tile() -> None:
    grey = Image.fromarray(noise((70, 50)))
    config = BioVilPreprocessConfig(resize=32, size=28)
    assert (preprocess_biovil(grey, config) == preprocess_biovil(grey.convert("RGB"), config)).all()


@pytest.mark.parametrize(
    ("size", "scaled"), [((600, 512), (600, 512)), ((2544, 3056), (512, 615)), ((100, 100), (512, 512))]
)
def test_resize_and_crop_at_the_released_sizes(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    image = Image.fromarray(restated(noise((size[1], size[0]))))
    whole = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
    left, top = round((scaled[0] - 448) / 2), round((scaled[1] - 448) / 2)
    tiles = preprocess_biovil(image, BioVilPreprocessConfig())
    assert (tiles.shape, tiles.dtype) == ((1, 448, 448, 3), np.uint8)
    assert (tiles == whole[top : top + 448, left : left + 448, None]).all()


@pytest.mark.parametrize(("width", "left"), [(10, 2), (11, 2), (12, 3), (13, 4), (14, 4), (15, 4)])
def test_half_a_pixel_is_rounded_to_even(width: int, left: int) -> None:
    values = restated(noise((6, width)))
    got = preprocess_biovil(Image.fromarray(values), BioVilPreprocessConfig(resize=6, size=6))
    assert (got[0, :, :, 0] == values[:, left : left + 6]).all()


def test_a_picture_of_one_value_becomes_black() -> None:
    tiles = preprocess_biovil(Image.new("RGB", (20, 20), (77, 77, 77)), BioVilPreprocessConfig(resize=16, size=8))
    assert not tiles.any()


@pytest.mark.parametrize("mode", ["RGBA", "F", "I", "P"])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"not {mode};"):
        preprocess_biovil(Image.new(mode, (4, 4)), BioVilPreprocessConfig())


@pytest.mark.parametrize(("resize", "size"), [(8, 9), (8, 0), (-1, -1)])
def test_impossible_settings_are_refused(resize: int, size: int) -> None:
    with pytest.raises(ValueError, match="size must be"):
        BioVilPreprocessConfig(resize=resize, size=size)
