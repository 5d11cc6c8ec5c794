"""One frame of a DICOM file as its stored values, decompressed by pydicom's plugins.

A compressed frame states its own size, from which a decoder allocates memory; so it is compared with the file's header
before any decoder sees it. pydicom and its plugins are an extra, imported only here. Raises ImageError without `param`,
and never with a decoder's text. Knows nothing about grey levels and windows.
"""

from __future__ import annotations

import functools
import logging
import struct
import zlib
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from llava_core.errors import ImageError
from llava_core.images.dicom.apart import decode_apart
from llava_core.images.dicom.header import Header
from llava_core.images.dicom.rle import unpacked

_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_RLE, _JPEG_12_BIT = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51"
_JPEG_2000 = tuple(f"1.2.840.10008.1.2.4.{number}" for number in (90, 91, 201, 202, 203))
_GDCM, _CHARLS = "gdcm", "pyjpegls"
# Plugins that, on a damaged frame, may neither finish in time nor raise an exception.
_APART = (_GDCM, _CHARLS)
# Which of pydicom's plugins decompresses a transfer syntax, so that results do not depend on what else is installed.
_PLUGINS = {
    "1.2.840.10008.1.2.4.50": "pillow",
    _JPEG_12_BIT: "pillow",
    "1.2.840.10008.1.2.4.57": _GDCM,
    "1.2.840.10008.1.2.4.70": _GDCM,
    "1.2.840.10008.1.2.4.80": _CHARLS,
    "1.2.840.10008.1.2.4.81": _CHARLS,
    **dict.fromkeys(_JPEG_2000, "pylibjpeg"),
}
_SUPPORTED = "uncompressed, RLE, JPEG of 8 bits, lossless JPEG, JPEG-LS, JPEG 2000 and HTJ2K"
# What pydicom and its plugins raise for damaged data. Warning is here for processes that turn warnings into errors.
_DECODER_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    Warning,
    struct.error,
    zlib.error,
)
# In JPEG and JPEG-LS: markers followed by a frame's size, and markers not followed by a length.
_SIZE_MARKERS = (set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}


def stored_values(header: Header, frame: int) -> npt.NDArray[Any]:
    """Values of a frame, counted from 1: (rows, columns), or (rows, columns, 3) for 8-bit RGB."""
    syntax = header.syntax
    if syntax not in (*_NATIVE, _RLE, *_PLUGINS):
        raise ImageError(f"the DICOM file's compression is not supported; supported are: {_SUPPORTED}")
    if syntax == _JPEG_12_BIT and header.stored > 8:
        raise ImageError("the DICOM file is lossy JPEG of 12 bits, which is not supported; export it lossless")
    decoder = _decoder(_NATIVE[1] if syntax == _RLE else syntax)
    plugin = _PLUGINS.get(syntax, "")
    options = {
        "rows": header.rows,
        "columns": header.columns,
        "number_of_frames": 1,
        "samples_per_pixel": header.samples,
        "photometric_interpretation": header.photometric,
        # Unpacked RLE data is stored sample by sample.
        "planar_configuration": 1 if syntax == _RLE else header.planar,
        "bits_allocated": header.allocated,
        "bits_stored": header.stored,
        "pixel_representation": int(header.is_signed),
        "pixel_keyword": "PixelData",
    }
    try:
        data = _native_frame(header, frame) if syntax in _NATIVE else _compressed_frame(header, frame)
        if plugin in _APART:
            return _shaped(decode_apart(syntax, plugin, data, options), header)
        values, _ = decoder.as_array(data, index=0, decoding_plugin=plugin, **options)
    except _DECODER_ERRORS:
        raise ImageError(
            f"frame {frame} of the DICOM file cannot be decoded: its data is damaged or cut short"
        ) from None
    decoded: npt.NDArray[Any] = values
    return decoded


def _shaped(data: bytes, header: Header) -> npt.NDArray[Any]:
    values = np.frombuffer(data, f"<{'i' if header.is_signed else 'u'}{header.allocated // 8}")
    return values.reshape(header.rows, header.columns, *([header.samples] if header.samples > 1 else []))


@functools.cache
def _decoder(syntax: str) -> Any:
    """pydicom's decoder, with logging turned off: errors in a client's file are reported to the client."""
    try:
        pixels = import_module("pydicom.pixels")
        decoder = pixels.get_decoder(syntax)
        is_there = syntax in _NATIVE or _PLUGINS[syntax] in decoder.available_plugins
    except ImportError:
        is_there = False
    if not is_there:
        raise ImageError("DICOM files need packages that are not installed here: pip install 'llava-serve[dicom]'")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    return decoder


def _native_frame(header: Header, frame: int) -> bytes:
    # In 4:2:2 two pixels share their colours: four bytes in place of six.
    samples = 2 if header.photometric == "YBR_FULL_422" else header.samples
    length = header.rows * header.columns * samples * header.allocated // 8
    if len(header.pixels) < length * header.num_frames:
        raise ImageError(
            f"the DICOM file has {len(header.pixels)} bytes of pixels, but its {header.num_frames} frames of "
            f"{header.columns} x {header.rows} pixels need {length * header.num_frames}; export it again"
        )
    return header.pixels[(frame - 1) * length : frame * length]


def _compressed_frame(header: Header, frame: int) -> bytes:
    """The frame on its own: unpacked for RLE, otherwise encapsulated, as pydicom's decoders require."""
    encaps = import_module("pydicom.encaps")
    data: bytes = encaps.get_frame(
        header.pixels, frame - 1, number_of_frames=header.num_frames, extended_offsets=header.offsets
    )
    if header.syntax == _RLE:
        num_pixels = header.rows * header.columns
        return unpacked(data, num_pixels=num_pixels, samples=header.samples, sample_bytes=header.allocated // 8)
    size = _size_2000(data) if header.syntax in _JPEG_2000 else _size_jpeg(data)
    if size != (header.columns, header.rows, header.samples):
        raise ImageError(
            f"frame {frame} of the DICOM file is not of {header.columns} x {header.rows} pixels, as its header says; "
            "export it again"
        )
    envelope: bytes = encaps.encapsulate([data], has_bot=False)
    return envelope


def _size_jpeg(data: bytes) -> tuple[int, int, int]:
    """Columns, rows and samples of a JPEG or JPEG-LS. Raises struct.error or ValueError where they are missing."""
    offset = 2
    while data[:2] == b"\xff\xd8":
        mark, kind = struct.unpack_from(">BB", data, offset)
        if mark != 0xFF:
            break
        if kind == 0xFF:
            # Padding before a marker.
            offset += 1
        elif kind in _BARE_MARKERS:
            offset += 2
        elif kind in _SIZE_MARKERS:
            rows, columns, samples = struct.unpack_from(">HHB", data, offset + 5)
            return columns, rows, samples
        else:
            offset += 2 + max(2, struct.unpack_from(">H", data, offset + 2)[0])
    raise ValueError("no marker where one must be")


def _size_2000(data: bytes) -> tuple[int, int, int]:
    """Columns, rows and samples from the start of a JPEG 2000 codestream. Raises struct.error or ValueError."""
    if data[:4] != b"\xff\x4f\xff\x51":
        raise ValueError("no codestream")
    right, bottom, left, top = struct.unpack_from(">4L", data, 8)
    return right - left, bottom - top, struct.unpack_from(">H", data, 40)[0]
