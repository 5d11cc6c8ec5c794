"""A file's description of its pixels is validated: everything missing, wrong or unsupported is named."""

from typing import Any

import numpy as np
import pytest
from pydicom import Dataset

from llava_core.errors import ImageError
from llava_core.images.dicom.header import Header, read_header
from tests.dicom_files import PLANTED, data_set, dicom, radiograph, written


def read(**more: Any) -> Header:
    return read_header(dicom(radiograph(), bits=12, **more), max_bytes=10**7)


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        read_header(data, max_bytes=10**7)
    assert PLANTED not in caught.value.message
    return caught.value.message


def without(name: str, **more: Any) -> bytes:
    found = data_set(radiograph(), bits=12, **more)
    delattr(found, name)
    return written(found)


def test_size_bits_windows_and_rescaling_are_read() -> None:
    header = read(WindowCenter=[40, 50.5], WindowWidth=[400, "1e3"], RescaleSlope="2", RescaleIntercept="-1024.5")
    assert (header.columns, header.rows, header.num_frames, header.samples) == (40, 48, 1, 1)
    assert (header.allocated, header.stored, header.is_signed, header.photometric) == (16, 12, False, "MONOCHROME2")
    assert header.windows(1) == ((40.0, 400.0), (50.5, 1000.0))
    assert header.rescale(1) == (2.0, -1024.5)
    assert header.function(1) == "LINEAR"


def test_windows_and_rescaling_are_optional() -> None:
    header = read()
    assert (header.windows(1), header.rescale(1), header.modality, header.voi, header.padding) == (
        (),
        None,
        None,
        None,
        None,
    )


@pytest.mark.parametrize("name", ["Rows", "Columns", "BitsAllocated"])
def test_missing_required_elements_are_named(name: str) -> None:
    assert f"{name} is missing" in refusal(without(name))


@pytest.mark.parametrize(
    ("sop_class", "named"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.33", "a structured report"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "a document in an envelope, such as a PDF"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "a presentation state"),
        ("1.2.840.10008.5.1.4.1.1.2", "it may be cut short"),
    ],
)
def test_a_file_without_pixels_is_described(sop_class: str, named: str) -> None:
    message = refusal(without("PixelData", SOPClassUID=sop_class))
    assert "no pixel data" in message
    assert named in message


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"PhotometricInterpretation": PLANTED.upper()}, "PhotometricInterpretation is none of MONOCHROME1"),
        ({"SamplesPerPixel": 3}, "3 samples per pixel, which does not fit MONOCHROME2"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "32 bits in 32"),
        ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, "1 bits in 1"),
        ({"BitsStored": 12, "HighBit": 15}, "the highest being bit 15"),
        ({"BitsStored": 17}, "17 bits in 16"),
        ({"NumberOfFrames": "0"}, "NumberOfFrames is not a valid number"),
        ({"NumberOfFrames": str(2**31)}, "NumberOfFrames is not a valid number"),
    ],
)
def test_unsupported_values_are_named(more: dict[str, Any], named: str) -> None:
    assert named in refusal(dicom(radiograph(), **{"bits": 12, **more}))


def test_floating_point_pixels_are_refused() -> None:
    found = data_set(radiograph())
    del found.PixelData
    found.FloatPixelData = np.zeros(4, np.float32).tobytes()
    assert "floating-point" in refusal(written(found))


@pytest.mark.parametrize("value", [f"{PLANTED}", "1e400", "nan", "1,5", "0x10", "1_000", "--1", "\u0661"])
def test_invalid_numbers_are_refused_and_not_echoed(value: str) -> None:
    data = dicom(radiograph(), bits=12, WindowCenter="11111111", WindowWidth="5")
    given = value.encode("utf-8").ljust(8)[:8]
    header = read_header(data.replace(b"11111111", given), max_bytes=10**7)
    with pytest.raises(ImageError, match="WindowCenter is missing or cannot be read"):
        header.windows(1)


def test_window_centres_and_widths_must_match_in_number() -> None:
    with pytest.raises(ImageError, match="differ in number"):
        read(WindowCenter=[1, 2], WindowWidth=[3]).windows(1)


def test_an_unknown_function_is_refused_and_not_echoed() -> None:
    with pytest.raises(ImageError, match="none of LINEAR, LINEAR_EXACT, SIGMOID") as caught:
        read(VOILUTFunction=PLANTED.upper()).function(1)
    assert PLANTED.upper() not in caught.value.message


def test_tables_shorter_than_declared_are_refused() -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [300, 0, 16], b"\1\0" * 10
    table["LUTData"].VR = "OW"
    assert "shorter than it says" in refusal(dicom(radiograph(), bits=12, VOILUTSequence=[table]))
    assert "look-up table is missing" in refusal(dicom(radiograph(), bits=12, VOILUTSequence=[Dataset()]))


def test_a_segmented_palette_is_refused() -> None:
    data = dicom((radiograph() // 16).astype(np.uint8), photometric="PALETTE COLOR")
    assert "in segments" in refusal(data)
