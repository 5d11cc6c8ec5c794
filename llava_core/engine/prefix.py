"""What a block of a prompt holds, as a key: its tokens, the pictures in it by digest, and all that came before.

Every placeholder of a picture has the same id, so ids alone would let two pictures share a block; here they cannot.
Standard library only. Knows nothing about caches.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from llava_core.types import Size


@dataclass(frozen=True)
class ImageSpan:
    """The prompt's tokens [start, stop) are the picture of this digest, which was of this size in pixels."""

    start: int
    stop: int
    digest: str
    size: Size | None


def next_key(
    previous: bytes, tokens: Sequence[int], start: int, images: Sequence[ImageSpan], *, block_size: int
) -> bytes:
    """The key of the block that begins at token `start`; `previous` is the key of the block before it, b"" of the
    first."""
    stop = start + block_size
    content = blake2b(previous, digest_size=20)
    content.update(array("q", tokens[start:stop]).tobytes())
    for image in images:
        if image.start < stop and start < image.stop:
            # Where in the picture the block begins is settled by the tokens before; where the picture begins is not.
            content.update(repr((image.start - start, image.digest, image.size)).encode())
    return content.digest()
