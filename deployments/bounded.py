"""Answers of others, read whole and never beyond a limit: nobody outside decides how much is held in memory.

Knows pieces of bytes. How long they may take is the caller's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator


async def read_up_to(pieces: AsyncIterator[bytes], max_bytes: int) -> bytes | None:
    """All of them together; None as soon as they are more than that, with the rest unread."""
    kept, size = [], 0
    async for piece in pieces:
        size += len(piece)
        if size > max_bytes:
            return None
        kept.append(piece)
    return b"".join(kept)
