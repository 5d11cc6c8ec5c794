"""Decoding in a child process gives the original values, and a crash of the child does not affect the parent."""

import pytest
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEGLosslessSV1

from llava_core.images.dicom.apart import decode_apart
from llava_core.images.dicom.header import read_header
from tests.dicom_files import lossless_jpeg, radiograph

OPTIONS = {
    "rows": 48,
    "columns": 40,
    "number_of_frames": 1,
    "samples_per_pixel": 1,
    "photometric_interpretation": "MONOCHROME2",
    "planar_configuration": 0,
    "bits_allocated": 16,
    "bits_stored": 12,
    "pixel_representation": 0,
    "pixel_keyword": "PixelData",
}


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    data = lossless_jpeg(radiograph(), tmp_path_factory.mktemp("jpeg"), bits=12)
    whole: bytes = get_frame(read_header(data, max_bytes=10**7).pixels, 0, number_of_frames=1)
    return whole


def decoded(frame: bytes) -> bytes:
    return decode_apart(JPEGLosslessSV1, "gdcm", encapsulate([frame], has_bot=False), OPTIONS)


def test_the_child_returns_the_original_values(frame: bytes) -> None:
    assert decoded(frame) == radiograph().astype("<u2").tobytes()


def test_a_crash_of_the_child_is_reported_as_an_undecodable_frame(
    frame: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """A precision of 17 bits, which the standard does not have, crashes a process that uses GDCM."""
    damaged = bytearray(frame)
    damaged[frame.index(b"\xff\xc3") + 4] = 17
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        decoded(bytes(damaged))
    # The suppressed context holds the whole frame.
    assert caught.value.__suppress_context__
    assert capfd.readouterr() == ("", "")


def test_a_truncated_frame_cannot_be_decoded(frame: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        decoded(frame[:30])


def test_a_child_that_takes_too_long_is_killed(frame: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.images.dicom.apart._TIMEOUT_S", 0.01)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decoded(frame)
