"""A least-recently-used cache bounded in bytes.

Knows nothing about its values, not even their size: the caller states it with each `put`. Safe to use from several
threads. Standard library only.
"""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """At most `max_bytes` of values by key; with 0 it keeps nothing. Callers share values and must not modify them."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, not {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        # Least recently used first.
        self._entries: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, key: str) -> bool:
        """Whether the key is cached; does not count as a use."""
        return key in self._entries

    def get(self, key: str) -> Value | None:
        """The value, which becomes the most recently used; None where there is none."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.num_misses += 1
                return None
            self.num_hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: str, value: Value, num_bytes: int) -> None:
        """Store the value, replacing the key's old one and evicting others as needed; one too large is not kept."""
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
