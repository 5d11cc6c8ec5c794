"""Reads the elements of a DICOM file that a picture needs; all others are skipped without looking at their values.

Replaces pydicom's reader, which reads everything, repeats values in warnings, and inflates a deflated file without
limit. Here the work is bounded by the number of elements, the nesting depth of sequences, and the bytes once inflated.
Knows how elements are encoded, but not what they mean. Raises ImageError without `param` and without any value.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import TypeAlias

from llava_core.errors import ImageError

# The tags wanted from a data set; for a sequence, also the tags wanted from its items.
Wanted: TypeAlias = "Mapping[int, Wanted | None]"
# A value as stored, or the items of a sequence.
Elements: TypeAlias = "dict[int, bytes | list[Elements]]"

TRANSFER_SYNTAX = 0x00020010
PIXEL_DATA = 0x7FE00010
_EXPLICIT_LITTLE, _IMPLICIT_LITTLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_DEFLATED, _EXPLICIT_BIG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"

_MARK_AT, _DATA_AT = 128, 132
# As stored. The group of the file's own elements, always explicit VR, which precede those of the picture.
_HEAD_GROUP = b"\x02\0"
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
# Far more than any picture has; reading them takes a few seconds at most.
_MAX_ELEMENTS, _MAX_DEPTH = 500_000, 16


def is_dicom(data: bytes) -> bool:
    """Whether these bytes have the mark of a DICOM file."""
    return data[_MARK_AT:_DATA_AT] == b"DICM"


def read_elements(data: bytes, wanted: Wanted, *, max_bytes: int) -> tuple[str, Elements]:
    """The transfer syntax, and those of the `wanted` elements that exist up to and including the pixels.

    Reading ends with the pixels; compressed ones are returned with all their items. Raises ImageError.
    """
    head = _Reader(data, is_implicit=False, group=_HEAD_GROUP)
    stored = head.data_set({TRANSFER_SYNTAX: None}, _DATA_AT, len(data)).get(TRANSFER_SYNTAX)
    if not isinstance(stored, bytes):
        raise ImageError("the DICOM file does not state its transfer syntax (0002,0010); save it as a Part 10 file")
    syntax, rest = stored.decode("latin-1").rstrip("\0 "), data[head.offset :]
    if syntax == _EXPLICIT_BIG:
        raise ImageError("the DICOM file is big endian, which was retired; save it as explicit VR little endian")
    if syntax == _DEFLATED:
        rest, syntax = _inflated(rest, max_bytes), _EXPLICIT_LITTLE
    return syntax, _Reader(rest, is_implicit=syntax == _IMPLICIT_LITTLE).data_set(wanted, 0, len(rest))


def _inflated(deflated: bytes, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(deflated, max_bytes + 1)
    except zlib.error:
        raise _damaged("its deflated part cannot be inflated") from None
    if len(inflated) > max_bytes:
        raise ImageError(
            f"the DICOM file has more than {max_bytes} bytes once inflated, which is the limit", code="image_too_large"
        )
    if not inflater.eof:
        raise _damaged("its deflated part is cut short")
    return inflated


class _Reader:
    """Reads one file's data set; `offset` is the current position. With `group`, reads only elements of that group."""

    def __init__(self, data: bytes, *, is_implicit: bool, group: bytes | None = None) -> None:
        self.offset = 0
        self._data = data
        self._is_implicit = is_implicit
        self._group = group
        self._left = _MAX_ELEMENTS

    def data_set(
        self, wanted: Wanted, start: int, end: int, *, is_implicit: bool | None = None, depth: int = 0
    ) -> Elements:
        """The wanted elements from `start` on, up to the pixels or the end of the item."""
        is_implicit = self._is_implicit if is_implicit is None else is_implicit
        found: Elements = {}
        self.offset = start
        while self.offset < end:
            if self._group is not None and self._data[self.offset : self.offset + 2] != self._group:
                break
            tag, vr, length = self._head(end, is_implicit=is_implicit)
            if tag == _ITEM_END:
                break
            is_wanted, inner = tag in wanted, wanted.get(tag)
            if tag == PIXEL_DATA and depth == 0 and length == _UNDEFINED:
                begin = self.offset
                self._skip_fragments(end)
                found[tag] = self._data[begin : self.offset]
            elif length == _UNDEFINED or (is_wanted and inner is not None):
                # An element of undefined length and unknown type is a sequence, with implicit VRs inside.
                inside = is_implicit or vr == b"UN"
                items = self._items(inner or {}, length, end, is_implicit=inside, depth=depth + 1)
                if is_wanted:
                    found[tag] = items
            else:
                value_at = self.offset
                self._skip(length, end)
                if is_wanted:
                    found[tag] = self._data[value_at : self.offset]
            if tag == PIXEL_DATA and depth == 0:
                break
        return found

    def _items(self, wanted: Wanted, length: int, end: int, *, is_implicit: bool, depth: int) -> list[Elements]:
        if depth > _MAX_DEPTH:
            raise _damaged(f"its sequences nest deeper than {_MAX_DEPTH}")
        begin = self.offset
        if length != _UNDEFINED:
            self._skip(length, end)
            self.offset, end = begin, begin + length
        items: list[Elements] = []
        while self.offset < end:
            tag, size = self._item_head(end)
            if tag == _SEQUENCE_END:
                return items
            begin = self.offset
            if size == _UNDEFINED:
                items.append(self.data_set(wanted, begin, end, is_implicit=is_implicit, depth=depth))
                continue
            self._skip(size, end)
            if wanted:
                items.append(self.data_set(wanted, begin, begin + size, is_implicit=is_implicit, depth=depth))
                self.offset = begin + size
        if length == _UNDEFINED:
            raise _damaged("it is cut short")
        return items

    def _skip_fragments(self, end: int) -> None:
        while True:
            tag, size = self._item_head(end)
            if tag == _SEQUENCE_END:
                return
            self._skip(size, end)

    def _head(self, end: int, *, is_implicit: bool) -> tuple[int, bytes, int]:
        group, element, length = struct.unpack("<HHL", self._take(8, end))
        tag = group << 16 | element
        if is_implicit or tag == _ITEM_END:
            return tag, b"", length
        self.offset -= 4
        vr, length = struct.unpack("<2sH", self._take(4, end))
        if not vr.isalpha() or not vr.isupper():
            raise _damaged("an element has no value representation")
        if vr in _LONG_VRS:
            (length,) = struct.unpack("<L", self._take(4, end))
        return tag, vr, length

    def _item_head(self, end: int) -> tuple[int, int]:
        group, element, length = struct.unpack("<HHL", self._take(8, end))
        tag = group << 16 | element
        if tag not in (_ITEM, _SEQUENCE_END):
            raise _damaged("a sequence holds something that is not an item")
        return tag, length

    def _take(self, count: int, end: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise _damaged(f"it has more than {_MAX_ELEMENTS} elements")
        begin = self.offset
        self._skip(count, end)
        return self._data[begin : self.offset]

    def _skip(self, count: int, end: int) -> None:
        if self.offset + count > end:
            raise _damaged("it is cut short, or a length in it is wrong")
        self.offset += count


def _damaged(why: str) -> ImageError:
    return ImageError(f"the DICOM file cannot be read: {why}; export it again")
