"""DICOM's run-length encoding (PS3.5 annex G), bounded: output never exceeds the frame that the header announces.

Implemented here because the libraries fail on data with too many runs: pydicom's decoder expands them all, to 64 bytes
per byte, and pylibjpeg's ends in a panic that no exception handler sees. Knows nothing about files.
"""

from __future__ import annotations

import struct

import numpy as np

_HEADER = struct.Struct("<16L")


def unpacked(frame: bytes, *, num_pixels: int, samples: int, sample_bytes: int) -> bytes:
    """The frame uncompressed, little endian, sample by sample. Raises ValueError for one that is damaged."""
    if len(frame) < _HEADER.size:
        raise ValueError("shorter than its header")
    count, *offsets = _HEADER.unpack_from(frame)
    if count != samples * sample_bytes:
        raise ValueError("the number of segments must be that of bytes per pixel")
    ends = [*offsets[1:count], len(frame)]
    planes = np.empty((samples, num_pixels, sample_bytes), np.uint8)
    for index, (start, end) in enumerate(zip(offsets[:count], ends, strict=True)):
        # The most significant byte of a sample comes first.
        sample, place = divmod(index, sample_bytes)
        plane = _unpacked_segment(frame[start:end], num_pixels)
        planes[sample, :, sample_bytes - 1 - place] = np.frombuffer(plane, np.uint8)
    return planes.tobytes()


def _unpacked_segment(segment: bytes, length: int) -> bytes:
    unpacked = bytearray()
    place = 0
    while len(unpacked) < length:
        if place >= len(segment):
            raise ValueError("a segment is cut short")
        mark = segment[place]
        if mark < 128:
            unpacked += segment[place + 1 : place + 2 + mark]
            place += 2 + mark
        else:
            if mark > 128:
                unpacked += segment[place + 1 : place + 2] * (257 - mark)
                place += 1
            # 128 is a no-op.
            place += 1
    return bytes(unpacked[:length])
