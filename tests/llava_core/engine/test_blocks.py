"""The block pool against a slow, obvious model: no block is lost or handed out twice; the oldest is evicted first."""

from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llava_core.engine.blocks import BlockPool

KEYS = [bytes([letter]) for letter in b"abcdefgh"]


class PoolAgainstModel(RuleBasedStateMachine):
    """`holders` are the block lists of requests; the users of a block are recounted each time."""

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.holders: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        # Unused blocks with content, least recently used first.
        self.idle: list[int] = []

    @property
    def used(self) -> Counter[int]:
        return Counter(block for holder in self.holders for block in holder)

    @property
    def free(self) -> set[int]:
        return set(range(self.pool.num_blocks)) - set(self.used) - set(self.idle)

    def known(self, keys: list[bytes]) -> list[int]:
        found: list[int] = []
        for key in keys:
            holding = [block for block, content in self.content.items() if content == key]
            if not holding:
                break
            found += holding
        return found

    @rule(count=st.integers(0, 6), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        after = data.draw(st.none() | st.integers(0, self.pool.num_blocks - 1))
        free, before = self.free, deepcopy(vars(self.pool))
        taken = self.pool.allocate(count, after=after)
        if count > len(free) + len(self.idle):
            assert taken is None
            assert vars(self.pool) == before
            return
        assert taken is not None
        assert len(set(taken)) == len(taken) == count
        # Content is evicted only when free blocks run out, oldest first.
        evicted = self.idle[: max(0, count - len(free))]
        assert set(taken) - free == set(evicted)
        neighbours = 0
        while after is not None and neighbours < count and after + 1 + neighbours in free:
            neighbours += 1
        assert taken[:neighbours] == [after + 1 + i for i in range(neighbours) if after is not None]
        assert taken[neighbours:] == sorted(taken[neighbours:])
        for block in evicted:
            del self.content[block]
        self.idle = self.idle[len(evicted) :]
        if taken:
            self.holders.append(taken)

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True))
    def find_and_hold(self, keys: list[bytes]) -> None:
        found = self.pool.find(iter(keys))
        assert found == self.known(keys)
        self.pool.hold(found)
        self.idle = [block for block in self.idle if block not in found]
        if found:
            self.holders.append(found)

    @precondition(lambda self: self.used.keys() - self.content.keys())
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.used.keys() - self.content.keys())))
        self.pool.publish(block, key)
        if key not in self.content.values():
            self.content[block] = key

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(holder)
        # The beginning of a prompt is worth more to others than its end.
        self.idle += [block for block in reversed(holder) if block not in self.used and block in self.content]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def disown(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.pool.disown(holder)
        for block in holder:
            self.content.pop(block, None)

    @invariant()
    def the_pool_matches_the_model(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.used)
        assert self.pool.num_idle == len(self.idle)
        assert self.pool.num_available == len(self.idle) + len(self.free)
        assert [self.pool.find([key]) for key in KEYS] == [self.known([key]) for key in KEYS]


PoolAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestPoolAgainstModel = PoolAgainstModel.TestCase


def take(pool: BlockPool, count: int, *, after: int | None = None) -> list[int]:
    taken = pool.allocate(count, after=after)
    assert taken is not None
    return taken


def fill(pool: BlockPool, keys: str) -> list[int]:
    """Simulates a request that wrote one block per letter and has finished."""
    blocks = take(pool, len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key.encode())
    pool.release(blocks)
    return blocks


def known(pool: BlockPool, keys: str) -> str:
    return "".join(key for key in keys if pool.find([key.encode()]))


def test_the_last_blocks_of_a_request_are_evicted_first() -> None:
    pool = BlockPool(3, 4)
    fill(pool, "abc")
    left = []
    for _ in range(3):
        take(pool, 1)
        left.append(known(pool, "abc"))
    assert left == ["ab", "a", ""]


def test_the_least_recently_used_block_is_evicted_first() -> None:
    pool = BlockPool(4, 4)
    fill(pool, "ab")
    fill(pool, "cd")
    again = pool.find([b"a", b"b"])
    pool.hold(again)
    pool.release(again)
    take(pool, 2)
    assert known(pool, "abcd") == "ab"


def test_content_is_kept_while_a_block_is_free() -> None:
    pool = BlockPool(4, 4)
    fill(pool, "ab")
    take(pool, 2)
    assert known(pool, "ab") == "ab"


def test_a_held_block_is_not_evicted() -> None:
    pool = BlockPool(3, 4)
    fill(pool, "abc")
    pool.hold(pool.find([b"a", b"b", b"c"]))
    assert pool.allocate(1) is None
    assert known(pool, "abc") == "abc"


def test_a_shared_block_is_freed_with_its_last_user() -> None:
    pool = BlockPool(1, 4)
    fill(pool, "a")
    for _ in range(2):
        pool.hold(pool.find([b"a"]))
    pool.release([0])
    assert (pool.num_used, pool.num_idle) == (1, 0)
    pool.release([0])
    assert (pool.num_used, pool.num_idle) == (0, 1)


def test_find_stops_at_the_first_unknown_block() -> None:
    pool = BlockPool(4, 4)
    blocks = fill(pool, "acd")
    assert pool.find([b"a", b"b", b"c"]) == blocks[:1]


def test_a_second_block_with_the_same_content_is_not_kept() -> None:
    pool = BlockPool(2, 4)
    first, second = take(pool, 2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([first, second])
    assert pool.num_idle == 1


def test_a_disowned_block_is_never_found_again() -> None:
    pool = BlockPool(2, 4)
    blocks = take(pool, 2)
    pool.publish(blocks[0], b"a")
    pool.disown(blocks)
    pool.release(blocks)
    assert pool.find([b"a"]) == []
    assert pool.num_idle == 0


def test_neighbours_are_preferred_to_blocks_freed_earlier() -> None:
    pool = BlockPool(8, 4)
    blocks = take(pool, 8)
    pool.release([blocks[4], blocks[3], blocks[0], blocks[7]])
    assert take(pool, 3, after=2) == [3, 4, 7]


def test_the_first_blocks_of_a_fresh_pool_are_adjacent() -> None:
    assert take(BlockPool(8, 4), 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_blocks_or_tokens_is_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{sizes[0]} of {sizes[1]}"):
        BlockPool(*sizes)


@pytest.mark.parametrize("misuse", ["publish twice", "publish nobody's", "release nobody's", "hold a free one"])
def test_misuse_fails_at_once(misuse: str) -> None:
    pool = BlockPool(3, 4)
    (used,) = take(pool, 1)
    pool.publish(used, b"a")
    with pytest.raises((AssertionError, KeyError)):
        {
            "publish twice": lambda: pool.publish(used, b"b"),
            "publish nobody's": lambda: pool.publish(2, b"b"),
            "release nobody's": lambda: pool.release([2]),
            "hold a free one": lambda: pool.hold([2]),
        }[misuse]()
