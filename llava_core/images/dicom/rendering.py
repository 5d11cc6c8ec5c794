"""Renders stored values as defined by the DICOM standard (PS3.3 C.11): modality, window or table, inversion.

All of it is one function of the stored value, of which there are at most 65,536: it is computed for each of them in
double precision, and the picture's values are looked up. Not done by pydicom's functions, whose 8-bit tables wrap.
Knows nothing about files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llava_core.errors import ImageError
from llava_core.images.dicom.header import MONOCHROME, PALETTE, Header, Lut
from llava_core.views import DicomView, ImageTransform, Window

Floats = npt.NDArray[np.float64]


# No modality measures larger values; arithmetic with them would overflow.
_MAX_VALUE = 1e12


def render(
    header: Header, values: npt.NDArray[Any], view: DicomView, *, keeps_depth: bool
) -> tuple[Image.Image, ImageTransform]:
    """The rendered frame and its transform: RGB for colour pictures; else 8-bit grey, or 16-bit with `keeps_depth`.

    Raises ImageError without `param`.
    """
    if header.photometric in MONOCHROME:
        return _grey(header, values, view, white=65_535 if keeps_depth else 255)
    if view.window is not None:
        raise ImageError(f"windows apply to grey pictures, but this one is {header.photometric}; leave the window out")
    if header.photometric == PALETTE:
        every = _every(values)
        palette = [_looked_up(lut, every) / (2**lut.bits - 1) for lut in header.palette]
        values = np.rint(np.stack(palette, -1) * 255).astype(np.uint8)[_unsigned(values)]
    return Image.fromarray(values.astype(np.uint8, copy=False)), _transform(header, view)


def _grey(
    header: Header, values: npt.NDArray[Any], view: DicomView, *, white: int
) -> tuple[Image.Image, ImageTransform]:
    every, rescale = _every(values), header.rescale(view.frame)
    if header.modality is not None:
        every, rescale = _looked_up(header.modality, every), None
    elif rescale is not None:
        if max(map(abs, rescale)) * np.abs(every).max() > _MAX_VALUE:
            raise ImageError("the DICOM file's rescale slope or intercept is beyond any measurable value")
        every = every * rescale[0] + rescale[1]
    window = _window(header, view)
    if window is not None:
        levels = _windowed(every, window)
    elif header.voi is not None:
        levels = _looked_up(header.voi, every) / (2**header.voi.bits - 1)
    else:
        window = _range(every[_occurring(header, values)])
        levels = _windowed(every, window)
    is_inverted = header.photometric == "MONOCHROME1"
    if is_inverted:
        levels = 1 - levels
    table = np.rint(levels * white).astype(np.uint8 if white == 255 else np.uint16)
    transform = replace(
        _transform(header, view),
        rescale=rescale,
        has_modality_lut=header.modality is not None,
        window=window,
        has_voi_lut=window is None,
        is_inverted=is_inverted,
    )
    return Image.fromarray(table[_unsigned(values)]), transform


def _window(header: Header, view: DicomView) -> Window | None:
    """The requested window, else the file's first; None where the file has a table instead, or no window."""
    if isinstance(view.window, tuple):
        return _checked(Window(*view.window, header.function(view.frame), "request"))
    if view.window is None and header.voi is not None:
        return None
    windows = header.windows(view.frame)
    if view.window is None and not windows:
        return None
    index = view.window or 1
    if index > len(windows):
        raise ImageError(f"the DICOM file has {len(windows)} windows; there is no window {index}")
    return _checked(Window(*windows[index - 1], header.function(view.frame), "file"))


def _checked(window: Window) -> Window:
    is_linear = window.function == "LINEAR"
    if window.width < 1 if is_linear else window.width <= 0:
        raise ImageError(
            f"the {window.source}'s window has a width of {window.width:g}, which {window.function} cannot have; "
            "give a window of your own"
        )
    return window


def _windowed(values: Floats, window: Window) -> Floats:
    """The grey levels of values seen through a window: 0 is the darkest, 1 the lightest."""
    centre, width = window.centre, window.width
    if window.function == "SIGMOID":
        # Clipped: beyond, the result is 0 or 1 to any precision, and the exponential would overflow.
        result: Floats = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -500, 500)))
        return result
    if window.function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    if width == 0:
        return (values > centre).astype(np.float64)
    clipped: Floats = np.clip((values - centre) / width + 0.5, 0, 1)
    return clipped


def _range(values: Floats) -> Window:
    """The window from the least to the greatest value; for a single value, the window centred on it."""
    low, high = float(values.min()), float(values.max())
    return Window((low + high) / 2, (high - low) or 1.0, "LINEAR_EXACT", "values")


def _occurring(header: Header, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of all possible values occur, padding left out unless there is nothing else."""
    occurs = np.zeros(2 ** (8 * values.dtype.itemsize), np.bool_)
    occurs[_unsigned(values)] = True
    if header.padding is None:
        return occurs
    every = _every(values)
    without = occurs & ~((every >= header.padding[0]) & (every <= header.padding[1]))
    return without if without.any() else occurs


def _every(values: npt.NDArray[Any]) -> Floats:
    """Every value of the type, in the order of the bit patterns."""
    bits = np.arange(2 ** (8 * values.dtype.itemsize), dtype=_unsigned(values).dtype)
    return bits.view(values.dtype).astype(np.float64)


def _unsigned(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.view(f"u{values.dtype.itemsize}")


def _looked_up(lut: Lut, values: Floats) -> Floats:
    places = np.clip(np.rint(values) - lut.first, 0, len(lut.entries) - 1).astype(np.int64)
    found: Floats = lut.entries[places].astype(np.float64)
    return found


def _transform(header: Header, view: DicomView) -> ImageTransform:
    return ImageTransform(
        format="DICOM",
        photometric=header.photometric,
        bits=header.stored,
        is_signed=header.is_signed,
        frame=view.frame,
        num_frames=header.num_frames,
    )
