"""How the C library gives back the memory of large buffers: bodies of requests, decoded pictures.

Knows glibc, and nothing of what is in the buffers.
"""

from __future__ import annotations

import ctypes
import platform

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# As much as bodies arrive in at once; most pictures are larger.
_LARGE_BYTES = 256 * 1024


def give_back_large_buffers() -> None:
    """From now on, in this process, what is large has pages of its own, which go when it is freed.

    glibc does so only until the first such buffer is freed: it then takes buffers of up to that size, 32 MiB at most,
    from the heaps of its threads, and lets the end of each of them lie idle up to twice as long. So a process in which
    several threads take turns grows for many minutes, by the largest request that each thread will have met.
    """
    if platform.libc_ver()[0] != "glibc":
        # Others do not have this to set.
        return
    libc = ctypes.CDLL(None)
    # Setting one also ends that both grow by themselves.
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
