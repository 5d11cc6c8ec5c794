"""Turns a decoded radiograph into the grey uint8 tile BioViL-T reads: contrast stretched, resized, centre-cropped.

There is no mean or standard deviation: the tower only divides by 255. Knows nothing about files or models.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava_core.images.preprocess import PreprocessConfig, resize_shortest_edge


@dataclass(frozen=True)
class BioVilPreprocessConfig:
    """Sides in pixels: the shorter one is resized to `resize`, then the centre square of `size` is kept."""

    resize: int = 512
    size: int = 448

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.resize:
            raise ValueError(f"size must be at least 1 pixel and at most resize: {self}")


# The preprocessing configuration of any tower.
AnyPreprocessConfig: TypeAlias = PreprocessConfig | BioVilPreprocessConfig


def preprocess_biovil(image: Image.Image, config: BioVilPreprocessConfig) -> npt.NDArray[np.uint8]:
    """The tile of an RGB, 8-bit grey or 16-bit grey picture: uint8 (1, size, size, 3), three equal channels.

    Raises ValueError for a picture of any other mode.
    """
    grey = stretch_contrast(image).convert("L")
    grey = resize_shortest_edge(grey, config.resize, Image.Resampling.BILINEAR, rows_first=True)
    tile = np.asarray(_centre_crop(grey, config.size), np.uint8)
    return np.repeat(tile[None, :, :, None], 3, axis=3)


def stretch_contrast(image: Image.Image) -> Image.Image:
    """The picture with its darkest value at 0 and its lightest at 255, rounded down; 16 bits become 8.

    All channels of an RGB picture are stretched alike. A picture of a single value becomes black.
    """
    if image.mode in ("L", "RGB"):
        values = np.asarray(image)
        table = _stretch_table(int(values.min()), int(values.max()))
        table = np.concatenate([table, np.zeros(256 - len(table), np.uint8)])
        return image.point(table.tolist() * len(image.getbands()))
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        return Image.fromarray(_stretch_table(int(values.min()), int(values.max()))[values])
    raise ValueError(f"expected an RGB, L or I;16 picture, not {image.mode}; decode with images.loading first")


def _stretch_table(lowest: int, highest: int) -> npt.NDArray[np.uint8]:
    """The stretched value of every value up to `highest`; none lies below `lowest`."""
    above = np.maximum(np.arange(highest + 1) - lowest, 0).astype(np.float64)
    return (above / max(highest - lowest, 1) * 255).astype(np.uint8)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    # torchvision's CenterCrop: half pixels are rounded to even, where CLIP's processor rounds down.
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
