"""Bookkeeping of the key-value cache: which blocks are free, in use, or idle but kept for later requests.

A block holds the keys and values of `block_size` tokens. Its key identifies its content and everything before it, so
every request whose prompt begins alike can use a block published under a key. Integers and keys only: knows neither
tensors nor requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks, each free, used by at least one request, or idle: unused, but kept for its content.

    Idle blocks are evicted when none is free, least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks, and blocks need tokens: {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Dictionaries as ordered sets: the first is the next to be allocated.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._users: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could return."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks held by requests."""
        return len(self._users)

    @property
    def num_idle(self) -> int:
        """Blocks that no request holds and that are kept for their content."""
        return len(self._idle)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks published under these keys, up to the first unknown key. The caller must `hold` them."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Add one user to each of these used or idle blocks."""
        for block in blocks:
            if block in self._users:
                self._users[block] += 1
            else:
                del self._idle[block]
                self._users[block] = 1

    def allocate(self, count: int, *, after: int | None = None) -> list[int] | None:
        """Allocate `count` blocks of unspecified content with one user each; None when there are too few.

        The blocks are adjacent where possible, the first next to `after`: contiguous memory is read faster.
        """
        if count > self.num_available:
            return None
        taken: list[int] = []
        while after is not None and len(taken) < count and after + 1 in self._free:
            after += 1
            del self._free[after]
            taken.append(after)
        rest = [self._next_block() for _ in range(count - len(taken))]
        taken += sorted(rest)
        self._users.update(dict.fromkeys(taken, 1))
        return taken

    def publish(self, block: int, key: bytes) -> None:
        """Record what a used block holds. Where another block is published with the same content, that one stays."""
        assert block in self._users, f"block {block} is nobody's"
        assert block not in self._key_of, f"block {block} has a key already"
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one user from each of a request's blocks. Its last blocks are the first to be reused."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            (self._idle if block in self._key_of else self._free)[block] = None

    def disown(self, blocks: Iterable[int]) -> None:
        """Forget the content of these used blocks: other requests must not use it."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state and that the two key maps agree. For tests."""
        states = [*self._free, *self._idle, *self._users]
        assert sorted(states) == list(range(self.num_blocks)), "a block is lost or in two states"
        assert all(users > 0 for users in self._users.values()), self._users
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        assert not set(self._free) & set(self._key_of), "a free block has content"
        assert set(self._idle) <= set(self._key_of), "an idle block has no content"

    def _next_block(self) -> int:
        if self._free:
            return self._free.popitem(last=False)[0]
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
