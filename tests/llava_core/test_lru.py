"""The cache against a slow, obvious model: least recently used entries are evicted first, and the byte limit holds."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.lru import LruCache

KEYS = st.sampled_from("abcde")
# A key without a size is looked up; one with a size is stored.
STEPS = st.lists(st.tuples(KEYS, st.none() | st.integers(1, 12)), max_size=40)


class SlowCache:
    """Keeps entries in order of use, the latest last, and recomputes the total size each time."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.kept: list[tuple[str, int, int]] = []

    def get(self, key: str) -> int | None:
        found = [entry for entry in self.kept if entry[0] == key]
        self.kept = [entry for entry in self.kept if entry[0] != key] + found
        return found[0][1] if found else None

    def put(self, key: str, value: int, size: int) -> None:
        self.kept = [entry for entry in self.kept if entry[0] != key]
        if size <= self.max_bytes:
            self.kept.append((key, value, size))
        while self.num_bytes > self.max_bytes:
            del self.kept[0]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, _, size in self.kept)


@given(max_bytes=st.integers(0, 20), steps=STEPS)
def test_the_cache_keeps_the_same_entries_as_the_slow_one(max_bytes: int, steps: list[tuple[str, int | None]]) -> None:
    cache, slow = LruCache[int](max_bytes), SlowCache(max_bytes)
    hits = looked_up = 0
    for value, (key, size) in enumerate(steps):
        if size is None:
            expected = slow.get(key)
            assert cache.get(key) == expected
            looked_up += 1
            hits += expected is not None
        else:
            cache.put(key, value, size)
            slow.put(key, value, size)
        assert cache.num_bytes == slow.num_bytes <= max_bytes
        assert [each for each in "abcde" if each in cache] == sorted(each for each, _, _ in slow.kept)
    assert (cache.num_hits, cache.num_misses) == (hits, looked_up - hits)
    assert [cache.get(key) for key in "abcde"] == [slow.get(key) for key in "abcde"]


def test_concurrent_threads_get_the_right_values_and_counts() -> None:
    cache = LruCache[tuple[str, int]](300)
    keys = [str(number) for number in range(20)]

    def work(seed: int) -> None:
        for step in range(2000):
            key = keys[(step * (seed + 3)) % len(keys)]
            found = cache.get(key)
            assert found is None or found[0] == key
            cache.put(key, (key, step), 1 + (step + seed) % 40)
            assert 0 <= cache.num_bytes <= 300

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert cache.num_hits + cache.num_misses == 4 * 2000
    left = [key for key in keys if cache.get(key) is not None]
    for key in left:
        cache.put(key, (key, 0), 301)
    assert cache.num_bytes == 0


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="not -1"):
        LruCache[int](-1)
    with pytest.raises(ValueError, match="at least 1 byte"):
        LruCache[int](5).put("a", 1, 0)
