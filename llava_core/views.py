"""How a picture's stored values are displayed: the caller's choice for a DICOM file, and the transform applied.

Values without behaviour of their own, like those in types.py, and parsers for them. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DicomView:
    """The view of a DICOM file: a frame, counted from 1, through a window.

    `window` is centre and width, or the number of one of the file's own, counted from 1; None: the file's default.
    """

    frame: int = 1
    window: tuple[float, float] | int | None = None

    def __post_init__(self) -> None:
        if self.frame < 1:
            raise ValueError(f"frames are counted from 1, not {self.frame}")
        if isinstance(self.window, int):
            if self.window < 1:
                raise ValueError(f"windows are counted from 1, not {self.window}")
        elif self.window is not None and not (math.isfinite(self.window[0]) and 0 < self.window[1] < math.inf):
            raise ValueError(f"a window is a centre and a width above 0, not {self.window}")


def read_window(text: str) -> tuple[float, float] | int:
    """Parse `CENTRE,WIDTH` or the number of one of the file's own windows. Raises ValueError stating valid forms."""
    try:
        centre, comma, width = text.partition(",")
        window = (float(centre), float(width)) if comma else int(centre)
        DicomView(window=window)
    except ValueError:
        raise ValueError("give CENTRE,WIDTH such as 40,400, with a width above 0, or a number counted from 1") from None
    return window


def read_frame(text: str) -> int:
    """Parse the number of a frame. Raises ValueError stating the valid form."""
    if not (text.isdecimal() and int(text)):
        raise ValueError("give the number of a frame, counted from 1")
    return int(text)


@dataclass(frozen=True)
class Window:
    """Which values become the darkest and the lightest, by which of DICOM's functions, and where the window came from.

    Source `values`: the range of values in the picture. `type`: the full range of its type.
    """

    centre: float
    width: float
    function: str
    source: Literal["request", "file", "values", "type"]


@dataclass(frozen=True)
class ImageTransform:
    """How the stored values of a DICOM picture, or of 16-bit grey, became the values seen.

    In the order of the fields: one frame's values of `bits` bits are rescaled by slope and intercept or by a look-up
    table, mapped through a window or another table, and inverted. Colours pass through none of these.
    """

    format: str
    photometric: str
    bits: int
    is_signed: bool = False
    frame: int = 1
    num_frames: int = 1
    rescale: tuple[float, float] | None = None
    has_modality_lut: bool = False
    window: Window | None = None
    has_voi_lut: bool = False
    is_inverted: bool = False
