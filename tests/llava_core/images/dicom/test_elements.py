"""Only wanted elements are read, with pydicom's values; bombs, endless nesting and truncated files raise our errors."""

import io
import struct
import time
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from pydicom import Dataset, Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from llava_core.errors import ImageError
from llava_core.images.dicom.elements import PIXEL_DATA, is_dicom, read_elements
from llava_core.images.dicom.header import WANTED
from tests.dicom_files import PLANTED, compressed, data_set, dicom, radiograph, written

ROWS, VOI_LUTS = 0x00280010, 0x00283010


def read(data: bytes, *, max_bytes: int = 10**7) -> dict:
    return read_elements(data, WANTED, max_bytes=max_bytes)[1]


def refusal(data: bytes, *, max_bytes: int = 10**7) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(data, max_bytes=max_bytes)
    assert PLANTED not in caught.value.message
    return caught.value


def all_values(found: object) -> bytes:
    """Returns every byte that was read, at any depth."""
    if isinstance(found, bytes):
        return found
    inner = found.values() if isinstance(found, dict) else found
    return b"".join(map(all_values, inner))  # type: ignore[call-overload]


def a_file(syntax: str = ExplicitVRLittleEndian, *, undefined: bool = False) -> bytes:
    table = Dataset()
    table.LUTDescriptor, table.LUTExplanation = [2, 0, 16], f"{PLANTED} table"
    table.LUTData = b"\1\0\2\0"
    table["LUTData"].VR = "OW"
    found = data_set(radiograph(), bits=12, WindowCenter=[1, 2], WindowWidth=[3, 4], VOILUTSequence=Sequence([table]))
    if undefined:
        for sequence in (found["VOILUTSequence"], found["OtherPatientIDsSequence"]):
            sequence.is_undefined_length = True
            sequence.value[0].is_undefined_length_sequence_item = True
    return written(found, syntax=syntax)


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian],
    ids=lambda uid: uid.keyword,
)
def test_only_wanted_elements_are_read_with_pydicoms_values(syntax: str, *, undefined: bool) -> None:
    data = a_file(syntax, undefined=undefined)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pydicom.dcmread(io.BytesIO(data))
    ours = read(data)
    assert set(ours) == {int(element.tag) for element in theirs} & set(WANTED)
    assert ours[ROWS] == struct.pack("<H", theirs.Rows)
    assert ours[PIXEL_DATA] == theirs.PixelData
    assert [set(item) for item in ours[VOI_LUTS]] == [{0x00283002, 0x00283006}]
    assert PLANTED.encode() not in all_values(ours)


def test_compressed_pixels_include_all_items() -> None:
    values = np.stack([radiograph(), radiograph()])
    data = compressed(values, "1.2.840.10008.1.2.5", bits=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pydicom.dcmread(io.BytesIO(data), specific_tags=["PixelData"]).PixelData
    assert read(data)[PIXEL_DATA].startswith(theirs)


def test_a_file_is_recognised_by_its_magic_bytes() -> None:
    assert is_dicom(a_file())
    assert not is_dicom(b"DICM" * 20)
    assert not is_dicom(b"")


@pytest.mark.parametrize("undefined", [False, True])
def test_a_truncated_file_is_refused_or_has_no_pixels(*, undefined: bool) -> None:
    data = a_file(undefined=undefined)
    for length in range(132, len(data), 7):
        message = ""
        try:
            found = read(data[:length])
        except ImageError as error:
            found, message = {}, error.message
        assert PIXEL_DATA not in found
        assert message == "" or "cut short" in message or "transfer syntax" in message


def test_deflated_data_is_inflated_up_to_a_limit() -> None:
    head = a_file(DeflatedExplicitVRLittleEndian)
    at = 132 + 12 + struct.unpack_from("<L", head, 140)[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = head[:at] + packer.compress(bytes(200_000_000)) + packer.flush()
    error = refusal(bomb)
    assert "more than 10000000 bytes once inflated" in error.message
    assert error.code == "image_too_large"
    assert "cut short" in refusal(head[:-20]).message
    assert "cannot be inflated" in refusal(head[:at] + b"\xff" * 50).message


def nested(depth: int) -> bytes:
    """Nests sequences in sequences, none of which ends."""
    data = a_file()
    at = data.index(struct.pack("<HH", 0x0010, 0x1002))
    step = struct.pack("<HH2sHL", 0x0010, 0x1002, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    return data[:at] + step * depth + data[at:]


def test_endlessly_nested_sequences_are_refused() -> None:
    assert "nest deeper than 16" in refusal(nested(100_000)).message


def test_too_many_elements_are_refused_in_time() -> None:
    data = a_file()
    at = data.index(struct.pack("<HH", 0x0010, 0x0010))
    empty = struct.pack("<HH2sH", 0x0009, 0x0001, b"LO", 0)
    started = time.process_time()
    assert "more than 500000 elements" in refusal(data[:at] + empty * 2_000_000 + data[at:]).message
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("syntax", "named"), [(ExplicitVRBigEndian, "big endian"), ("", "does not state its transfer syntax")]
)
def test_unsupported_encodings_are_named(syntax: str, named: str) -> None:
    data = a_file()
    if not syntax:
        assert named in refusal(data[:132]).message
        return
    old = b"1.2.840.10008.1.2.1\0"
    at = data.index(old)
    assert named in refusal(data[: at - 2] + struct.pack("<H", 20) + b"1.2.840.10008.1.2.2\0" + data[at + 20 :]).message


def test_wrong_lengths_are_refused() -> None:
    data = a_file()
    at = data.index(struct.pack("<HH2s", 0x0028, 0x0010, b"US"))
    assert "length in it is wrong" in refusal(data[: at + 6] + b"\xff\xff" + data[at + 8 :]).message
    assert "no value representation" in refusal(data[: at + 4] + b"\1\2" + data[at + 6 :]).message


def test_a_dicom_file_with_a_tiff_preamble_is_read() -> None:
    # A file's preamble may be anything; here it is a TIFF's.
    data = dicom(radiograph(), bits=12)
    assert PIXEL_DATA in read(b"II*\0" + data[4:])
