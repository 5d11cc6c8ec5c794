"""How a picture's stored values are looked at: what a caller chooses of a DICOM file, and what was done in the end.

Values without behaviour of their own, like those of types.py, and how they are written. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DicomView:
    """What of a DICOM file is looked at: a frame, counted from 1, through a window.

    `window` is centre and width, or the number of one of the file's own, counted from 1; None: as the file says.
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
    """`CENTRE,WIDTH`, or the number of one of the file's own windows. Raises ValueError that says what to write."""
    try:
        centre, comma, width = text.partition(",")
        window = (float(centre), float(width)) if comma else int(centre)
        DicomView(window=window)
    except ValueError:
        raise ValueError("give CENTRE,WIDTH such as 40,400, with a width above 0, or a number counted from 1") from None
    return window


def read_frame(text: str) -> int:
    """The number of a frame. Raises ValueError that says what to write."""
    if not (text.isdecimal() and int(text)):
        raise ValueError("give the number of a frame, counted from 1")
    return int(text)


@dataclass(frozen=True)
class Window:
    """Which values become the darkest and the lightest, by DICOM's functions, and who said so.

    `values`: those that occur in the picture. `type`: all that its type can hold.
    """

    centre: float
    width: float
    function: str
    source: Literal["request", "file", "values", "type"]


@dataclass(frozen=True)
class ImageTransform:
    """How the stored values of a DICOM picture, or of 16-bit grey, became those that are seen.

    In the order of the fields: values of so many `bits` of one frame are rescaled by slope and intercept, or by a
    table; seen through a window, or through a table; and turned over. Colours pass through neither.
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
