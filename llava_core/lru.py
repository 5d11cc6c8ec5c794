"""Values that may be wanted again, in a bounded number of bytes: what was used longest ago goes first.

Knows nothing about what it holds, its size included: who puts a value says how large it is. Safe to use from several
threads. Standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """At most `max_bytes` of values by key; with 0 it keeps nothing. All who ask share a value: none may change it."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, not {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        # The value that was used longest ago is the first.
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, key: str) -> bool:
        """Whether it is kept; asking counts for nothing."""
        return key in self._entries

    def get(self, key: str) -> Value | None:
        """The value, from now on the one that was used last; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.num_misses += 1
                return None
            self.num_hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: str, value: Value, num_bytes: int) -> None:
        """Keep the value in place of what the key had, and give up others for it; one that is too large is not kept."""
        if num_bytes < 1:
            raise ValueError(f"a value must have at least 1 byte, not {num_bytes}")
        with self._lock:
            if key in self._entries:
                self.num_bytes -= self._entries.pop(key)[1]
            if num_bytes > self.max_bytes:
                return
            while self.num_bytes + num_bytes > self.max_bytes:
                self.num_bytes -= self._entries.popitem(last=False)[1][1]
            self._entries[key] = (value, num_bytes)
            self.num_bytes += num_bytes
