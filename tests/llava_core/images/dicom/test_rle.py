"""Runs are unpacked by annex G, with the same result as pydicom's own decoder, which is unbounded."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.pixels.decoders.rle import _rle_decode_frame
from pydicom.pixels.encoders.native import _encode_segment

from llava_core.images.dicom.rle import unpacked


def packed(segments: list[bytes]) -> bytes:
    places = [64 + sum(map(len, segments[:index])) for index in range(len(segments))]
    return struct.pack("<16L", len(segments), *places, *[0] * (15 - len(places))) + b"".join(segments)


@given(seed=st.integers(0, 2**32), samples=st.sampled_from([1, 3]), sample_bytes=st.sampled_from([1, 2]))
def test_frames_are_unpacked_as_pydicom_does(seed: int, samples: int, sample_bytes: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 5, 7
    planes = rng.integers(0, 3, (samples * sample_bytes, rows, columns)).astype(np.uint8)
    frame = packed([bytes(_encode_segment(plane.tobytes(), columns)) for plane in planes])
    wanted = _rle_decode_frame(frame, rows, columns, samples, 8 * sample_bytes)
    got = unpacked(frame, num_pixels=rows * columns, samples=samples, sample_bytes=sample_bytes)
    assert got == bytes(wanted)


@pytest.mark.parametrize(
    "frame",
    [b"", b"\0" * 64, packed([b"\x03abcd"]), packed([b"\x03ab", b"\x03abcd"]), packed([b"\x80", b"\x03abcd"])],
)
def test_short_frames_and_wrong_segments_are_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match=r"header|segments|segment is cut short"):
        unpacked(frame, num_pixels=4, samples=1, sample_bytes=2)
