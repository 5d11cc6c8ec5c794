"""Keys for blocks of a prompt, from a block's tokens, the digests of its pictures, and everything before it.

Every placeholder of a picture has the same id, so keys from ids alone would let two pictures share a block.
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
    """The prompt's tokens [start, stop) are the picture with this digest and this size in pixels."""

    start: int
    stop: int
    digest: str
    size: Size | None


def next_key(
    previous: bytes, tokens: Sequence[int], start: int, images: Sequence[ImageSpan], *, block_size: int
) -> bytes:
    """The key of the block that begins at token `start`; `previous` is the key of the block before it, b"" for the
    first."""
    stop = start + block_size
    content = blake2b(previous, digest_size=20)
    content.update(array("q", tokens[start:stop]).tobytes())
    for image in images:
        if image.start < stop and start < image.stop:
            # The tokens before determine where in the picture the block begins, but not where the picture begins.
            content.update(repr((image.start - start, image.digest, image.size)).encode())
    return content.digest()
