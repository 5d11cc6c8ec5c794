"""Turns a decoded picture into the square uint8 tiles a CLIP-type tower reads: pad, crop, or an overview and tiles.

Normalisation is left to the tower (`vision/`): until then tiles stay uint8, a quarter of the bytes on every hop.
Knows nothing about files, base64 or models.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava_core.images.geometry import best_resolution, scaled_size
from llava_core.types import Size

Aspect = Literal["pad", "crop", "anyres"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Every released SigLIP uses these.
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PreprocessConfig:
    """How to preprocess pictures for a tower. `size` is the side of the square tile in pixels.

    `aspect` is LLaVA's `image_aspect_ratio`: `pad` pads to a square with the mean colour; `crop` resizes the shortest
    edge and cuts out the centre square, as CLIP itself does; `anyres` makes an overview and tiles at the best of the
    `pinpoints`. With `stretches` a picture is resized to the square, as SigLIP's processor does. `jitter` derives
    LLaVA-Med's one-pixel offset of the padding from the picture's own pixels. `rows_first` resizes as the original
    code's Pillow does (see `resize`).
    """

    size: int
    aspect: Aspect = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC
    pinpoints: tuple[Size, ...] = ()
    stretches: bool = False
    jitter: bool = False
    rows_first: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {self.size}")
        if self.aspect not in ("pad", "crop", "anyres"):
            raise ValueError(f"aspect must be 'pad', 'crop' or 'anyres', not {self.aspect!r}")
        if (self.aspect == "anyres") != bool(self.pinpoints):
            raise ValueError(f"pinpoints belong to aspect 'anyres' and no other: {self}")

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The colour of the padding: `int(mean * 255)` per channel, as in LLaVA."""
        red, green, blue = self.mean
        return int(red * 255), int(green * 255), int(blue * 255)


def preprocess(image: Image.Image, config: PreprocessConfig, *, overview_only: bool = False) -> npt.NDArray[np.uint8]:
    """The tiles of an RGB picture, uint8 of shape (num_tiles, size, size, 3). An overview, where there is one, comes
    first; with `overview_only` the other tiles are left out."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, not {image.mode}; decode with images.loading first")
    if config.aspect == "anyres":
        tiles = [overview(image, config)] if overview_only else cut_tiles(image, config)
        return np.stack([_fit(tile, config) for tile in tiles])
    if config.aspect == "pad":
        image = pad_to_square(image, config.pad_colour, shift=_jitter(image) if config.jitter else 0)
    return _fit(image, config)[None]


def _fit(image: Image.Image, config: PreprocessConfig) -> npt.NDArray[np.uint8]:
    """Resize or crop like the tower's own processor: uint8 (size, size, 3)."""
    if config.stretches:
        square = resize(image, (config.size, config.size), config.resample, rows_first=config.rows_first)
        return np.asarray(square, np.uint8)
    image = resize_shortest_edge(image, config.size, config.resample, rows_first=config.rows_first)
    return np.asarray(centre_crop(image, config.size), np.uint8)


def cut_tiles(image: Image.Image, config: PreprocessConfig) -> list[Image.Image]:
    """The overview, then the picture's best resolution cut into tiles row by row, on black."""
    size = Size(*image.size)
    best = best_resolution(size, config.pinpoints)
    scaled = resize(image, scaled_size(size, best), Image.Resampling.BICUBIC, rows_first=config.rows_first)
    canvas = Image.new("RGB", best, (0, 0, 0))
    canvas.paste(scaled, ((best.width - scaled.width) // 2, (best.height - scaled.height) // 2))
    tiles = [
        canvas.crop((x, y, x + config.size, y + config.size))
        for y in range(0, best.height, config.size)
        for x in range(0, best.width, config.size)
    ]
    return [overview(image, config), *tiles]


def overview(image: Image.Image, config: PreprocessConfig) -> Image.Image:
    """The picture squeezed into one tile."""
    return resize(image, (config.size, config.size), Image.Resampling.BICUBIC, rows_first=config.rows_first)


def _jitter(image: Image.Image) -> int:
    """0 or 1, always the same for the same picture; LLaVA-Med draws it anew each time, which makes answers vary."""
    return zlib.crc32(image.tobytes()) & 1


def pad_to_square(image: Image.Image, colour: tuple[int, int, int], *, shift: int = 0) -> Image.Image:
    """The picture centred on a square of its longer side; the offset is rounded down, as in LLaVA, plus `shift`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    left, top = (0 if length == side else (side - length) // 2 + shift for length in (width, height))
    square.paste(image, (left, top))
    return square


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, *, rows_first: bool) -> Image.Image:
    """The picture resized to `size`, one axis after the other: rows first, or in the installed Pillow's order.

    Values are rounded after each axis, so the order matters. Pillow resized rows first until version 13, which begins
    with the columns for some pictures that are taller than wide.
    """
    if rows_first:
        image = image.resize((size[0], image.height), resample)
    return image.resize(size, resample)


def resize_shortest_edge(
    image: Image.Image, size: int, resample: Image.Resampling, *, rows_first: bool = False
) -> Image.Image:
    """Scaled so that the shorter side is `size`; the longer one is rounded down, as CLIP's processor does."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(size * long / short)
    target = (size, scaled) if width <= height else (scaled, size)
    return image if target == image.size else resize(image, target, resample, rows_first=rows_first)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `size` pixels; the picture must be at least that large."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    if (left, top) == (0, 0) and image.size == (size, size):
        return image
    return image.crop((left, top, left + size, top + size))
