"""Makes the C library return the memory of large buffers to the system: request bodies, decoded pictures.

Knows glibc, but nothing about what is in the buffers.
"""

from __future__ import annotations

import ctypes
import platform

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The size of the pieces in which bodies arrive; most pictures are larger.
_LARGE_BYTES = 256 * 1024


def give_back_large_buffers() -> None:
    """Gives every large buffer of this process pages of its own, which are returned when it is freed.

    By default glibc does so only until the first such buffer is freed: from then on it takes buffers of up to that
    size, 32 MiB at most, from the heaps of its threads, and keeps up to twice as much idle at the end of each heap. So
    a process whose threads take turns grows for many minutes, by the largest request that each thread has handled.
    """
    if platform.libc_ver()[0] != "glibc":
        # Other C libraries have no such settings.
        return
    libc = ctypes.CDLL(None)
    # Setting either also stops glibc from raising both by itself.
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
