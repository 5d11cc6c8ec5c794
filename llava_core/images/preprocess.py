"""A decoded picture becomes the square uint8 tile a CLIP-type tower reads: pad or crop, then bicubic resize.

Normalisation is not done here: tiles stay uint8 until the tower, a quarter of the bytes on every hop (`vision/`).
Knows nothing about files, base64 or models.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PreprocessConfig:
    """How a tower wants its pictures. `size` is the side of the square tile in pixels.

    `aspect` is LLaVA's `image_aspect_ratio`: `pad` fills up to a square with the mean colour, `crop` resizes the
    shortest edge and cuts the centre square out, which is what CLIP itself does.
    """

    size: int
    aspect: Literal["pad", "crop"] = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {self.size}")
        if self.aspect not in ("pad", "crop"):
            raise ValueError(f"aspect must be 'pad' or 'crop', not {self.aspect!r}")

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The colour of the padding: `int(mean * 255)` per channel, as in LLaVA."""
        red, green, blue = self.mean
        return int(red * 255), int(green * 255), int(blue * 255)


def preprocess(image: Image.Image, config: PreprocessConfig) -> npt.NDArray[np.uint8]:
    """The tile of an RGB picture, uint8 of shape (1, size, size, 3)."""
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB picture, not {image.mode}; decode with images.loading first")
    if config.aspect == "pad":
        image = pad_to_square(image, config.pad_colour)
    image = resize_shortest_edge(image, config.size, config.resample)
    return np.asarray(centre_crop(image, config.size), np.uint8)[None]


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture centred on a square of its longer side; the offset is rounded down, as in LLaVA."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize_shortest_edge(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Scaled so that the shorter side is `size`; the longer one is rounded down, as CLIP's processor does."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(size * long / short)
    target = (size, scaled) if width <= height else (scaled, size)
    return image if target == image.size else image.resize(target, resample)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `size` pixels; the picture must be at least that large."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    if (left, top) == (0, 0) and image.size == (size, size):
        return image
    return image.crop((left, top, left + size, top + size))
