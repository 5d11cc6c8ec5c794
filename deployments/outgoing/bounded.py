"""Responses of other servers, read whole but never beyond a limit: no outsider decides how much memory they take.

Knows only pieces of bytes. Time limits are the caller's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator


async def read_up_to(pieces: AsyncIterator[bytes], max_bytes: int) -> bytes | None:
    """All pieces joined; None as soon as they exceed `max_bytes`, with the rest unread."""
    kept, size = [], 0
    async for piece in pieces:
        size += len(piece)
        if size > max_bytes:
            return None
        kept.append(piece)
    return b"".join(kept)
