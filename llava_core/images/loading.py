"""Decodes untrusted pictures to upright RGB images, or deep grey ones, and `data:` URLs to bytes.

The format's header is read and checked before a pixel is decoded; every error becomes an ImageError in our words, never
a decoder's. For animated pictures the first frame is used, for DICOM files the requested one (`dicom/`). Colour
profiles are ignored. Fetches nothing, and knows nothing about preprocessing or models. Safe to use from several
threads.
"""

import base64
import binascii
import io
import struct
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from llava_core.errors import ImageError
from llava_core.images.dicom.elements import is_dicom
from llava_core.images.dicom.frames import stored_values
from llava_core.images.dicom.header import read_header
from llava_core.images.dicom.rendering import render
from llava_core.views import DicomView, ImageTransform, Window

_MIB = 1024 * 1024
_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 0x0112, 258, 262, 0

# Signature and decoder. The decoders are called by name, because Image.open issues a process-wide warning for a large
# picture before the caller has seen its size.
_FORMATS: tuple[tuple[tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ((b"WEBP",), WebPImagePlugin.WebPImageFile),
    ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    ((b"BM",), BmpImagePlugin.BmpImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
)
_FORMAT_NAMES = "PNG, JPEG, WebP, GIF, BMP and TIFF, and DICOM files with the mark DICM after their first 128 bytes"
_DICOM_TYPE = "application/dicom"

# What decoders raise for damaged data. Warnings are here for processes that turn them into errors.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    EOFError,
    AttributeError,
    RuntimeError,
    MemoryError,
    AssertionError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# EXIF orientation to the transformation that makes the picture upright; 1 is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageLimits:
    """Limits of a picture. Bytes are encoded ones; `max_aspect` is longer side over shorter side.

    Side and aspect bound the memory of preprocessing, which pads to a square or enlarges the shorter side.
    """

    max_bytes: int = 20 * _MIB
    max_pixels: int = 40_000_000
    min_side: int = 1
    max_side: int = 10_000
    max_aspect: float = 200.0

    def __post_init__(self) -> None:
        if min(self.max_bytes, self.max_pixels, self.min_side) < 1:
            raise ValueError(f"max_bytes, max_pixels and min_side must be at least 1: {self}")
        if self.max_side < self.min_side:
            raise ValueError(f"max_side must not be below min_side: {self}")
        if not self.max_aspect >= 1:
            raise ValueError(f"max_aspect must be at least 1: {self}")


class DecodedImage(NamedTuple):
    """A picture, and the transform from its stored values where these are not the values seen."""

    image: Image.Image
    transform: ImageTransform | None = None


def decode_data_url(url: str, limits: ImageLimits, param: str) -> bytes:
    """The bytes of a `data:image/...;base64,` or `data:application/dicom;base64,` URL; ImageError for any other URL
    (code `invalid_image_url`), bad base64 or too many bytes."""
    if url[:5].lower() != "data:":
        message = "the image must be a data: URL with base64, or an http(s) address"
        raise ImageError(message, param=param, code="invalid_image_url")
    header, comma, payload = url.partition(",")
    kind, *options = header[5:].lower().split(";")
    is_picture = kind.startswith("image/") or kind == _DICOM_TYPE
    if not comma or not is_picture or not options or options[-1] != "base64":
        message = f"the image URL must begin with data:image/<type>;base64, or data:{_DICOM_TYPE};base64,"
        raise ImageError(message, param=param, code="invalid_image_url")
    return decode_base64(payload, limits, param)


def decode_base64(payload: str, limits: ImageLimits, param: str) -> bytes:
    """The decoded bytes; ImageError for bad base64 or too many bytes."""
    # Before decoding, so that an oversized upload costs nothing; exact but for the padding.
    _check_num_bytes(len(payload) // 4 * 3 - 2, limits, param)
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ImageError("the image's data is not valid base64 (RFC 4648, padded)", param=param) from None
    _check_num_bytes(len(data), limits, param)
    return data


def decode_image(
    data: bytes, limits: ImageLimits, *, param: str, keeps_depth: bool = False, dicom: DicomView | None = None
) -> DecodedImage:
    """Decode a picture: upright, RGB, transparency composited on white; 16-bit grey is scaled by the type's range.

    With `keeps_depth`, grey of more than 8 bits is returned in mode I;16, for callers that scale it by its contents.
    `dicom` selects the view of a DICOM file, and is refused for any other file.
    Raises ImageError naming cause and limit when the bytes are not a picture of a known format or exceed a limit.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)", param=param)
    _check_num_bytes(len(data), limits, param)
    if is_dicom(data):
        return _decode_dicom(data, limits, dicom or DicomView(), param=param, keeps_depth=keeps_depth)
    if dicom is not None:
        raise ImageError("the image is not a DICOM file; leave out its frame and window", param=param)
    picture = _open(data, param)
    check_size(picture.size, limits, param)
    try:
        picture.load()
        # Some formats reveal their size only now.
        check_size(picture.size, limits, param)
        image, transform = _seen(picture, param, keeps_depth=keeps_depth)
        return DecodedImage(_upright(image, picture), transform)
    except _DECODER_ERRORS:
        raise ImageError(
            f"the image cannot be decoded: its {picture.format} data is damaged or cut short", param=param
        ) from None


def _decode_dicom(data: bytes, limits: ImageLimits, view: DicomView, *, param: str, keeps_depth: bool) -> DecodedImage:
    try:
        header = read_header(data, max_bytes=limits.max_bytes)
        check_size((header.columns, header.rows), limits, param)
        if view.frame > header.num_frames:
            raise ImageError(f"the DICOM file has {header.num_frames} frames; there is no frame {view.frame}")
        image, transform = render(header, stored_values(header, view.frame), view, keeps_depth=keeps_depth)
    except ImageError as error:
        raise ImageError(error.message, param=param, code=error.code) from None
    return DecodedImage(image if keeps_depth and image.mode != "L" else image.convert("RGB"), transform)


def _check_num_bytes(count: int, limits: ImageLimits, param: str) -> None:
    if count > limits.max_bytes:
        raise ImageError(
            f"the image has {count} bytes; at most {limits.max_bytes} are allowed", param=param, code="image_too_large"
        )


def _open(data: bytes, param: str) -> ImageFile.ImageFile:
    """The picture with only its header read, not its pixels."""
    signature = data[8:12] if data.startswith(b"RIFF") else data[:8]
    decoder = next((decoder for prefixes, decoder in _FORMATS if signature.startswith(prefixes)), None)
    if decoder is None:
        raise ImageError(f"the data is not an image of a supported format: {_FORMAT_NAMES}", param=param)
    try:
        return decoder(io.BytesIO(data))
    except _DECODER_ERRORS:
        raise ImageError(
            f"the image cannot be read: its {decoder.format} header is damaged, cut short, gives a side of 0 pixels "
            "or asks for a variant that is not supported",
            param=param,
        ) from None


def check_size(size: tuple[int, int], limits: ImageLimits, param: str) -> None:
    """Raise ImageError for a width and height, in pixels, outside the limits."""
    width, height = size
    shorter, longer = min(size), max(size)
    shown = f"the image is {width} x {height} pixels"
    if shorter < limits.min_side:
        raise ImageError(f"{shown}; each side must have at least {limits.min_side}", param=param)
    if width * height > limits.max_pixels or longer > limits.max_side:
        raise ImageError(
            f"{shown}; at most {limits.max_pixels} pixels and {limits.max_side} per side are allowed",
            param=param,
            code="image_too_large",
        )
    if longer > limits.max_aspect * shorter:
        raise ImageError(f"{shown}; one side may be at most {limits.max_aspect:g} times the other", param=param)


def _seen(picture: ImageFile.ImageFile, param: str, *, keeps_depth: bool) -> DecodedImage:
    """A loaded picture of any mode as RGB; with `keeps_depth`, integer grey keeps all its bits."""
    if picture.mode == "F":
        raise ImageError("the image has floating-point pixels of unknown range; save it with 8 or 16 bits", param=param)
    if picture.mode.startswith("I"):
        return _deep_grey(picture, param, keeps_depth=keeps_depth)
    if not picture.has_transparency_data:
        return DecodedImage(picture.convert("RGB"))
    rgba = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    on_white = Image.new("RGB", rgba.size, "white")
    on_white.paste(rgba, mask=rgba.getchannel("A"))
    return DecodedImage(on_white)


def _deep_grey(picture: ImageFile.ImageFile, param: str, *, keeps_depth: bool) -> DecodedImage:
    """Integer grey scaled by its type's range, not by the values that happen to occur: equal pixels look equal."""
    # Pillow returns a 12-bit TIFF in a 16-bit mode, and does not invert a 16-bit one in which 0 is white.
    tags = picture.tag_v2 if isinstance(picture, TiffImagePlugin.TiffImageFile) else {}
    bits = 12 if tags.get(_BITS_TAG) == (12,) else 16
    white = 2**bits - 1
    is_inverted = picture.mode != "I" and tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO
    transform = ImageTransform(
        format=picture.format or "",
        photometric="MONOCHROME1" if is_inverted else "MONOCHROME2",
        bits=bits,
        is_inverted=is_inverted,
    )
    values = _grey_values(picture, white, param, is_inverted=is_inverted)
    if isinstance(transparent := picture.info.get("transparency"), int):
        values[values == transparent] = white
    if keeps_depth:
        return DecodedImage(Image.fromarray(values.astype(np.uint16)), transform)
    # In place: the largest pictures have 40 million values.
    values *= 255
    values += white // 2
    values //= white
    window = Window(white / 2, white, "LINEAR_EXACT", "type")
    return DecodedImage(Image.fromarray(values.astype(np.uint8)).convert("RGB"), replace(transform, window=window))


def _grey_values(picture: ImageFile.ImageFile, white: int, param: str, *, is_inverted: bool) -> npt.NDArray[np.int32]:
    """Integer grey with 0 as black."""
    values = np.asarray(picture).astype(np.int32)
    if values.min() < 0 or values.max() > white:
        raise ImageError(f"the image has grey values outside 0 to {white}; save it with 8 or 16 bits", param=param)
    return white - values if is_inverted else values


def _upright(rgb: Image.Image, picture: ImageFile.ImageFile) -> Image.Image:
    """The picture turned upright by its EXIF data; unreadable EXIF data is ignored, as in every viewer."""
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return rgb
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb
