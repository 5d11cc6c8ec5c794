"""A DICOM file's description of its pixels, read once and checked: sizes, bits, colours, windows, tables.

Files without a picture, or with an unsupported kind, are refused here, before a pixel is decoded. Error messages repeat
nothing from the file but numbers and the standard's own names. Knows nothing about decoding pixels. Raises ImageError
without `param`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from llava_core.errors import ImageError
from llava_core.images.dicom.elements import PIXEL_DATA, Elements, Wanted, read_elements

_SOP_CLASS, _FLOATS, _DOUBLES = 0x00080016, 0x7FE00008, 0x7FE00009
_SAMPLES, _PHOTOMETRIC, _PLANAR, _NUM_FRAMES = 0x00280002, 0x00280004, 0x00280006, 0x00280008
_ROWS, _COLUMNS, _ALLOCATED, _STORED = 0x00280010, 0x00280011, 0x00280100, 0x00280101
_HIGH_BIT, _SIGNED = 0x00280102, 0x00280103
_PADDING, _PADDING_LIMIT = 0x00280120, 0x00280121
_CENTRE, _WIDTH, _FUNCTION, _INTERCEPT, _SLOPE = 0x00281050, 0x00281051, 0x00281056, 0x00281052, 0x00281053
_MODALITY_LUTS, _VOI_LUTS, _LUT_DESCRIPTOR, _LUT_DATA = 0x00283000, 0x00283010, 0x00283002, 0x00283006
_PALETTE_DESCRIPTORS, _PALETTE_DATA = (0x00281101, 0x00281102, 0x00281103), (0x00281201, 0x00281202, 0x00281203)
_OFFSETS, _LENGTHS = 0x7FE00001, 0x7FE00002
# In multi-frame files: sequences with values per frame and with values shared by all frames.
_PER_FRAME, _SHARED, _FRAME_WINDOWS, _FRAME_RESCALE = 0x52009230, 0x52009229, 0x00289132, 0x00289145

_LUT: Wanted = {_LUT_DESCRIPTOR: None, _LUT_DATA: None}
_OF_FRAMES: Wanted = {
    _FRAME_WINDOWS: {_CENTRE: None, _WIDTH: None, _FUNCTION: None},
    _FRAME_RESCALE: {_INTERCEPT: None, _SLOPE: None},
}
# Everything ever read from a file, besides its transfer syntax.
WANTED: Wanted = {
    **dict.fromkeys((_SOP_CLASS, _SAMPLES, _PHOTOMETRIC, _PLANAR, _NUM_FRAMES, _ROWS, _COLUMNS)),
    **dict.fromkeys((_ALLOCATED, _STORED, _HIGH_BIT, _SIGNED, _PADDING, _PADDING_LIMIT)),
    **dict.fromkeys((_CENTRE, _WIDTH, _FUNCTION, _INTERCEPT, _SLOPE)),
    **dict.fromkeys((*_PALETTE_DESCRIPTORS, *_PALETTE_DATA)),
    **dict.fromkeys((_OFFSETS, _LENGTHS, _FLOATS, _DOUBLES, PIXEL_DATA)),
    _MODALITY_LUTS: _LUT,
    _VOI_LUTS: _LUT,
    _SHARED: _OF_FRAMES,
    _PER_FRAME: _OF_FRAMES,
}

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
# Three samples per pixel; pydicom's decoders convert all of them to RGB.
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_NO_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.88.": "a structured report",
    "1.2.840.10008.5.1.4.1.1.104.": "a document in an envelope, such as a PDF",
    "1.2.840.10008.5.1.4.1.1.11.": "a presentation state",
    "1.2.840.10008.1.3.10": "a directory of other files",
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MAX_VALUES = 64
Value = TypeVar("Value")


@dataclass(frozen=True)
class Lut:
    """A look-up table for values from `first` on; values below map to the first entry, values above to the last."""

    first: int
    bits: int
    entries: npt.NDArray[np.uint16] = field(repr=False)


@dataclass(frozen=True)
class Header:
    """One file's header. `elements` are kept for values that depend on the frame."""

    syntax: str
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    num_frames: int
    allocated: int
    stored: int
    is_signed: bool
    padding: tuple[int, int] | None
    modality: Lut | None
    voi: Lut | None
    palette: tuple[Lut, ...]
    pixels: bytes = field(repr=False)
    elements: Elements = field(repr=False)

    @property
    def offsets(self) -> tuple[bytes, bytes] | None:
        """The extended tables of offsets and lengths, where the file has both."""
        offsets, lengths = self.elements.get(_OFFSETS), self.elements.get(_LENGTHS)
        return (offsets, lengths) if isinstance(offsets, bytes) and isinstance(lengths, bytes) else None

    def rescale(self, frame: int) -> tuple[float, float] | None:
        """Slope and intercept of a frame, counted from 1."""
        found = self._of_frame(frame, _FRAME_RESCALE)
        if _SLOPE not in found and _INTERCEPT not in found:
            return None
        slope, intercept = _floats(found, _SLOPE, "RescaleSlope"), _floats(found, _INTERCEPT, "RescaleIntercept")
        return (slope or (1.0,))[0], (intercept or (0.0,))[0]

    def windows(self, frame: int) -> tuple[tuple[float, float], ...]:
        """Centre and width of a frame's windows, best first."""
        found = self._of_frame(frame, _FRAME_WINDOWS)
        centres, widths = _floats(found, _CENTRE, "WindowCenter"), _floats(found, _WIDTH, "WindowWidth")
        if len(centres) != len(widths):
            raise ImageError("the DICOM file's WindowWidth and WindowCenter differ in number; give your own window")
        return tuple(zip(centres, widths, strict=True))

    def function(self, frame: int) -> str:
        """The function that maps values within a window to grey."""
        name = _text(self._of_frame(frame, _FRAME_WINDOWS), _FUNCTION) or "LINEAR"
        if name not in _FUNCTIONS:
            raise ImageError(f"the DICOM file's VOILUTFunction is none of {', '.join(_FUNCTIONS)}")
        return name

    def _of_frame(self, frame: int, group: int) -> Elements:
        """The elements that hold a frame's values: the frame's own, the shared ones, or the file's."""
        for sequence, index in ((_PER_FRAME, frame - 1), (_SHARED, 0)):
            items = self.elements.get(sequence)
            if isinstance(items, list) and index < len(items):
                inner = items[index].get(group)
                if isinstance(inner, list) and inner:
                    return inner[0]
        return self.elements


def read_header(data: bytes, *, max_bytes: int) -> Header:
    """Read and check a header. `max_bytes` limits a deflated file's size once inflated. Picture sizes are not checked
    here. Raises ImageError."""
    syntax, found = read_elements(data, WANTED, max_bytes=max_bytes)
    pixels = _pixels(found)
    samples, photometric = _number(found, _SAMPLES, "SamplesPerPixel", 1), _photometric(found)
    if samples != (3 if photometric in _COLOURS else 1):
        raise ImageError(f"the DICOM file has {samples} samples per pixel, which does not fit {photometric}")
    is_signed = _number(found, _SIGNED, "PixelRepresentation", 0) == 1
    allocated = _number(found, _ALLOCATED, "BitsAllocated")
    stored = _number(found, _STORED, "BitsStored", allocated)
    _check_bits(allocated, stored, _number(found, _HIGH_BIT, "HighBit", stored - 1), photometric)
    # Meaningful only where there are several samples; then 0 or 1.
    planar = _number(found, _PLANAR, "PlanarConfiguration", 0) & 1
    rows, columns = _number(found, _ROWS, "Rows"), _number(found, _COLUMNS, "Columns")
    return Header(
        syntax=syntax,
        rows=rows,
        columns=columns,
        samples=samples,
        photometric=photometric,
        planar=planar,
        num_frames=_num_frames(found),
        allocated=allocated,
        stored=stored,
        is_signed=is_signed,
        padding=_padding(found, is_signed=is_signed),
        modality=_first_lut(found, _MODALITY_LUTS, is_signed=is_signed),
        # A table's output is never signed; a rescaled value may be.
        voi=_first_lut(found, _VOI_LUTS, is_signed=_MODALITY_LUTS not in found),
        palette=_palette(found, is_signed=is_signed) if photometric == PALETTE else (),
        pixels=pixels,
        elements=found,
    )


def _pixels(found: Elements) -> bytes:
    pixels = found.get(PIXEL_DATA)
    if isinstance(pixels, bytes) and pixels:
        return pixels
    if _FLOATS in found or _DOUBLES in found:
        raise ImageError("the DICOM file has floating-point pixels of unknown range; export it with 8 to 16 bits")
    sop_class = _text(found, _SOP_CLASS)
    what = next((name for prefix, name in _NO_PICTURES.items() if sop_class.startswith(prefix)), None)
    is_what = "it may be cut short" if what is None else f"it is {what}"
    raise ImageError(f"the DICOM file has no pixel data: {is_what}; send the file that holds the picture")


def _photometric(found: Elements) -> str:
    known = (*MONOCHROME, PALETTE, *_COLOURS)
    photometric = _text(found, _PHOTOMETRIC)
    if photometric not in known:
        raise ImageError(f"the DICOM file's PhotometricInterpretation is none of {', '.join(known)}")
    return photometric


def _check_bits(allocated: int, stored: int, high: int, photometric: str) -> None:
    if allocated not in (8, 16) or not 1 <= stored <= allocated or high != stored - 1:
        raise ImageError(
            f"the DICOM file stores {stored} bits in {allocated}, the highest being bit {high}; up to 16 bits, the "
            "lowest of 8 or 16, are supported"
        )
    if photometric in _COLOURS and stored != 8:
        raise ImageError(f"the DICOM file has {stored} bits per colour; 8 are supported")


def _num_frames(found: Elements) -> int:
    given = _floats(found, _NUM_FRAMES, "NumberOfFrames")
    count = given[0] if given else 1
    if not 1 <= count < 2**31 or count != int(count):
        raise ImageError("the DICOM file's NumberOfFrames is not a valid number of frames")
    return int(count)


def _padding(found: Elements, *, is_signed: bool) -> tuple[int, int] | None:
    values = [_words(found, tag, is_signed=is_signed) for tag in (_PADDING, _PADDING_LIMIT)]
    given = [each[0] for each in values if each]
    return (min(given), max(given)) if values[0] else None


def _first_lut(found: Elements, sequence: int, *, is_signed: bool) -> Lut | None:
    items = found.get(sequence)
    return (
        _lut(items[0], _LUT_DESCRIPTOR, _LUT_DATA, is_signed=is_signed) if isinstance(items, list) and items else None
    )


def _palette(found: Elements, *, is_signed: bool) -> tuple[Lut, ...]:
    if not all(tag in found for tag in _PALETTE_DATA):
        raise ImageError("the DICOM file has no palette, or one in segments, which is not supported; export it as RGB")
    pairs = zip(_PALETTE_DESCRIPTORS, _PALETTE_DATA, strict=True)
    return tuple(_lut(found, descriptor, data, is_signed=is_signed) for descriptor, data in pairs)


def _lut(found: Elements, descriptor: int, data: int, *, is_signed: bool) -> Lut:
    """A look-up table. Its entries are stored in 8 or 16 bits, whatever width the descriptor states."""
    words, stored = _words(found, descriptor, is_signed=False), found.get(data)
    if len(words) != 3 or not 1 <= words[2] <= 16 or not isinstance(stored, bytes):
        raise _unreadable("look-up table")
    count, first, bits = words[0] or 2**16, words[1], words[2]
    if is_signed and first >= 2**15:
        first -= 2**16
    # Entries of 8 bits may be stored in 8 bits or, in older files, in 16.
    is_narrow = bits <= 8 and len(stored) < 2 * count
    if len(stored) < count * (1 if is_narrow else 2):
        raise ImageError("the DICOM file has a look-up table that is shorter than it says; export it again")
    entries = np.frombuffer(stored, np.uint8 if is_narrow else "<u2", count).astype(np.uint16)
    if int(entries.max()) >> bits:
        # Some files state the wrong width; they then mean the full one.
        bits = 8 if is_narrow else 16
    return Lut(first, bits, entries)


def _number(found: Elements, tag: int, name: str, default: int | None = None) -> int:
    words = _words(found, tag, is_signed=False)
    if words:
        return words[0]
    if default is None:
        raise _unreadable(name)
    return default


def _words(found: Elements, tag: int, *, is_signed: bool) -> list[int]:
    stored = found.get(tag, b"")
    if not isinstance(stored, bytes) or len(stored) % 2:
        raise _unreadable("numbers")
    words: list[int] = np.frombuffer(stored, "<i2" if is_signed else "<u2").tolist()
    return words


def _text(found: Elements, tag: int) -> str:
    stored = found.get(tag, b"")
    return stored.decode("latin-1").strip(" \0") if isinstance(stored, bytes) else ""


def _floats(found: Elements, tag: int, name: str) -> tuple[float, ...]:
    texts = [text.strip(" \0") for text in _text(found, tag).split("\\", _MAX_VALUES)]
    if texts == [""]:
        return ()
    if len(texts) > _MAX_VALUES or not all(_NUMBER.fullmatch(text) for text in texts):
        raise _unreadable(name)
    values = tuple(float(text) for text in texts)
    if not all(math.isfinite(value) for value in values):
        raise _unreadable(name)
    return values


def _unreadable(name: str) -> ImageError:
    return ImageError(f"the DICOM file's {name} is missing or cannot be read; export it again")
