"""Frames decode to the original values from any compression; wrong sizes and damaged data are refused."""

import contextlib
import io
import logging
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import (
    JPEG2000,
    MPEG2MPML,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from llava_core.errors import ImageError
from llava_core.images.dicom.frames import stored_values
from llava_core.images.dicom.header import Header, read_header
from tests.dicom_files import (
    Values,
    compressed,
    data_set,
    dicom,
    implicit,
    lossless_jpeg,
    radiograph,
    with_frames,
    written,
)


def header(data: bytes) -> Header:
    return read_header(data, max_bytes=10**8)


def frame(data: bytes, number: int = 1) -> Values:
    return stored_values(header(data), number)


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        frame(data)
    assert caught.value.__cause__ is None
    return caught.value.message


@pytest.mark.parametrize("values", [radiograph(), radiograph().astype(np.int16) - 2000], ids=["unsigned", "signed"])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=lambda uid: uid.keyword)
def test_lossless_compression_keeps_all_values(values: Values, syntax: str) -> None:
    bits = 12 if values.dtype == np.uint16 else 16
    if values.dtype == np.int16 and syntax == JPEGLSLossless:
        bits = 13
    assert (frame(compressed(values, syntax, bits=bits)) == values).all()


def test_lossless_jpeg_keeps_all_values(tmp_path: Path) -> None:
    values = radiograph()
    assert (frame(lossless_jpeg(values, tmp_path, bits=12)) == values).all()


@pytest.mark.parametrize("make", [dicom, implicit])
def test_uncompressed_frames_are_read_individually(make: object) -> None:
    frames = np.stack([radiograph(), radiograph()[::-1], radiograph()[:, ::-1]])
    data = make(frames, bits=12)  # type: ignore[operator]
    for number, wanted in enumerate(frames, start=1):
        assert (frame(data, number) == wanted).all()


def test_compressed_frames_are_read_individually() -> None:
    frames = np.stack([radiograph(), radiograph()[::-1], radiograph()[:, ::-1]])
    data = compressed(frames, RLELossless, bits=12)
    for number, wanted in enumerate(frames, start=1):
        assert (frame(data, number) == wanted).all()


def test_unused_bits_are_ignored() -> None:
    values = radiograph()
    assert (frame(dicom(values | 0xF000, bits=12)) == values).all()


def colours() -> Values:
    y, x = np.mgrid[0:32, 0:48]
    return np.stack([y * 8, x * 5, 0 * y + 90], -1).astype(np.uint8)


@pytest.mark.parametrize("planar", [0, 1])
def test_colours_are_read_in_either_planar_order(planar: int) -> None:
    found = data_set(colours(), photometric="RGB", PlanarConfiguration=planar)
    if planar:
        found.PixelData = colours().transpose(2, 0, 1).tobytes()
    assert (frame(written(found)) == colours()).all()


def test_run_length_encoded_colours_keep_all_values() -> None:
    assert (frame(compressed(colours(), RLELossless, photometric="RGB")) == colours()).all()


def test_ybr_is_converted_to_rgb() -> None:
    ycc = np.asarray(Image.fromarray(colours()).convert("YCbCr"))
    got = frame(dicom(ycc, photometric="YBR_FULL")).astype(int)
    wanted = np.asarray(Image.fromarray(ycc, "YCbCr").convert("RGB")).astype(int)
    assert np.abs(got - wanted).max() <= 2


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "YBR_FULL"])
def test_a_colour_jpeg_is_decoded_to_rgb(photometric: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(colours()).save(buffer, "JPEG", quality=95)
    found = data_set(colours(), photometric=photometric)
    got = frame(with_frames(found, [buffer.getvalue()], JPEGBaseline8Bit)).astype(int)
    assert np.abs(got - colours().astype(int)).mean() < 3


def test_a_grey_jpeg_is_decoded() -> None:
    grey = np.asarray(Image.fromarray(colours()).convert("L"))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=95)
    got = frame(with_frames(data_set(grey), [buffer.getvalue()], JPEGBaseline8Bit)).astype(int)
    assert np.abs(got - grey.astype(int)).mean() < 3


def larger(syntax: str) -> bytes:
    """Makes a compressed frame larger than the file will declare."""
    whole = header(compressed(radiograph(400, 300), syntax, bits=12)).pixels
    (length,) = struct.unpack_from("<L", whole, 4)
    (size,) = struct.unpack_from("<L", whole, 8 + length + 4)
    return whole[16 + length : 16 + length + size]


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless], ids=lambda uid: uid.keyword)
def test_a_frame_of_another_size_than_declared_is_refused_undecoded(syntax: str) -> None:
    data = with_frames(data_set(radiograph(), bits=12), [larger(syntax)], syntax)
    assert "not of 40 x 48 pixels" in refusal(data)


def test_jpegs_of_another_size_than_declared_are_refused() -> None:
    buffer = io.BytesIO()
    Image.new("L", (400, 300)).save(buffer, "JPEG")
    for syntax in (JPEGBaseline8Bit, JPEGLosslessSV1):
        data = with_frames(data_set(np.zeros((3, 4), np.uint8)), [buffer.getvalue()], syntax)
        assert "not of 4 x 3 pixels" in refusal(data)


def test_runs_are_unpacked_only_up_to_the_frame_size() -> None:
    runs = b"\x81\x00" * 5_000_000
    bomb = struct.pack("<16L", 2, 64, 64 + len(runs) // 2, *[0] * 13) + runs
    started = time.process_time()
    assert (frame(with_frames(data_set(np.zeros((4, 4), np.uint16)), [bomb], RLELossless)) == 0).all()
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("syntax", "named"),
    [(MPEG2MPML, "JPEG-LS, JPEG 2000"), (JPEGExtended12Bit, "export it lossless"), ("1.2.Quxley", "JPEG-LS")],
)
def test_an_unsupported_compression_names_the_supported_ones(syntax: str, named: str) -> None:
    data = dicom(radiograph(), bits=12)
    old = b"1.2.840.10008.1.2.1\0"
    at = data.index(old)
    # The preceding field holds the length of the value; the new value must match it.
    given = syntax.encode() + b"\0" * (len(syntax) % 2)
    head = data[: at - 2] + struct.pack("<H", len(given)) + given + data[at + len(old) :]
    message = refusal(head)
    assert named in message
    assert "Quxley" not in message


def test_missing_pixels_are_reported_with_numbers() -> None:
    found = data_set(radiograph(), bits=12, NumberOfFrames=2)
    assert "has 3840 bytes of pixels, but its 2 frames of 40 x 48 pixels need 7680" in refusal(written(found))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000, JPEGLSLossless, JPEGLosslessSV1, JPEGBaseline8Bit])
@pytest.mark.parametrize(
    "data", [b"", b"\0\0", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\0\x0b\x08", b"\xff\x4f\xff\x51\0\x29"]
)
def test_garbage_is_refused_without_output(
    syntax: str, data: bytes, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "of the DICOM file" in refusal(with_frames(data_set(np.zeros((4, 4), np.uint8)), [data or b"\0\0"], syntax))
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_a_damaged_frame_is_refused_without_output(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        data = compressed(radiograph(), syntax, bits=12)
        at = len(data) - 400
        damaged = data[:at] + b"\xff" * 60 + data[at + 60 :]
        # Drop what the encoders logged.
        caplog.clear()
        with warnings.catch_warnings(), contextlib.suppress(ImageError):
            warnings.simplefilter("error")
            frame(damaged)
        assert [record for record in caplog.records if record.levelno >= logging.INFO] == []
    assert capfd.readouterr() == ("", "")


def test_without_the_extra_the_error_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('pydicom', 'pydicom.pixels', 'pylibjpeg', 'gdcm', 'jpeg_ls')))\n"
        "from llava_core.errors import ImageError\n"
        "from llava_core.images.loading import ImageLimits, decode_image\n"
        "try:\n"
        "    decode_image(sys.stdin.buffer.read(), ImageLimits(), param='here')\n"
        "except ImageError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=dicom(radiograph()), capture_output=True, check=True, timeout=60
    )
    assert b"pip install 'llava-serve[dicom]'" in done.stdout
