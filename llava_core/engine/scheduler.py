"""Which tokens run in the next step: which requests start, how prompts are split into chunks, who is preempted.

Policy on integers, in pure Python: knows neither tensors nor models. runner.py carries out its decisions.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from heapq import merge

from llava_core.engine.blocks import BlockPool
from llava_core.engine.config import StepLimits
from llava_core.engine.request import RequestState

# Blocks allocated to an answer at a time, so that they are contiguous, and their tokens at most.
_GROWTH, _GROWTH_TOKENS = 4, 64


@dataclass(frozen=True)
class Chunk:
    """The tokens [start, start + length) of a request, to be run through the model in this step."""

    state: RequestState
    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.length

    @property
    def is_last(self) -> bool:
        """Whether the next token can be sampled after this chunk."""
        return self.stop == len(self.state.tokens)


class Scheduler:
    """Requests by importance: lower `priority` first, then in order of arrival.

    Answers being decoded advance by one token in every step; the rest of the step's token budget goes to prompts. When
    blocks run out, the least important request is preempted: it gives up its blocks, keeps its features and its answer
    so far, and starts again when there is room.
    """

    def __init__(self, max_running: int, limits: StepLimits, pool: BlockPool) -> None:
        self._max_running, self._limits = max_running, limits
        self.pool = pool
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []
        self.num_preemptions = 0
        # Tokens that were found in the cache, including by requests that restart after preemption.
        self.num_cached = 0
        self._chunks: list[Chunk] = []

    @property
    def num_unread(self) -> int:
        """Tokens to prefill before every request is decoding. Some of the waiting requests' tokens may turn out to be
        in the cache."""
        reading = (state for state in self.running if state.num_pending > 1)
        return sum(state.num_pending for states in (self.waiting, reading) for state in states)

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        insort(self.waiting, state, key=_rank)

    def remove(self, state: RequestState) -> None:
        """Forget a request, running or waiting, and release its blocks."""
        (self.running if state.is_running else self.waiting).remove(state)
        self._give_back(state)

    def schedule(self) -> list[Chunk]:
        """The tokens of the next step. It includes every request that is decoding, unless it was preempted."""
        self._chunks = []
        num_before = self.num_preemptions
        budget = self._limits.max_tokens
        writing = [state for state in self.running if state.num_pending == 1]
        for state in writing:
            budget -= self._run(state, budget)
        if self._chunks:
            budget = min(budget, self._limits.prefill_chunk)
        self._read(budget, may_start=self.num_preemptions == num_before)
        return self._chunks

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk's keys and values are in the cache, and publish the blocks that are now full."""
        state, size = chunk.state, self.pool.block_size
        state.num_computed = chunk.stop
        for index in range(state.num_published, chunk.stop // size):
            self.pool.publish(state.blocks[index], state.block_key(index, size))
        state.num_published = max(state.num_published, chunk.stop // size)

    def _run(self, state: RequestState, budget: int) -> int:
        """Schedule as many of a running request's tokens as budget and blocks allow; returns how many."""
        length = min(state.num_pending, budget)
        if length < 1 or not state.is_running or not self._make_room(state, length):
            return 0
        self._chunks.append(Chunk(state, state.num_computed, length))
        return length

    def _read(self, budget: int, *, may_start: bool) -> None:
        """Spend the budget on prompts, started or waiting, by importance."""
        reading = [state for state in self.running if state.num_pending > 1]
        for state in merge(reading, list(self.waiting), key=_rank):
            if budget < 1:
                return
            if not state.is_running:
                if not may_start or len(self.running) >= self._max_running or self._is_being_read(state):
                    continue
                # No request overtakes one for which there is no room.
                may_start = self._start(state)
            budget -= self._run(state, budget)

    def _is_being_read(self, state: RequestState) -> bool:
        """Whether a more important running request is about to compute the next block of this one's prompt: waiting
        for it costs less."""
        size = self.pool.block_size
        known = len(self.pool.find(state.prefix_keys(size)))
        return known < state.num_shareable(size) and any(
            other.num_computed // size <= known < len(other.tokens) // size
            and other.block_key(known, size) == state.block_key(known, size)
            for other in self.running
            if other.num_pending > 1 and _rank(other) < _rank(state)
        )

    def _start(self, state: RequestState) -> bool:
        """Start a waiting request: hold the cached blocks of its prefix and allocate the rest; False without room."""
        size = self.pool.block_size
        found = self.pool.find(state.prefix_keys(size))
        self.pool.hold(found)
        needed = self._num_blocks(len(state.tokens)) - len(found)
        # Each running request can grow by a block before any is preempted.
        if self.pool.num_available < needed + len(self.running):
            self.pool.release(found)
            return False
        state.blocks = found
        state.blocks = found + self._allocate(state, needed)
        state.num_computed = len(found) * size
        state.num_published = len(found)
        self.num_cached += state.num_computed
        state.started()
        self.waiting.remove(state)
        insort(self.running, state, key=_rank)
        return True

    def _make_room(self, state: RequestState, length: int) -> bool:
        """Allocate blocks for `length` more tokens, preempting less important requests where none is left; False where
        the request itself had to be preempted."""
        needed = self._num_blocks(state.num_computed + length) - len(state.blocks)
        if needed < 1:
            return True
        while self.pool.num_available < needed:
            if not self._set_one_back(state):
                return False
        state.blocks = state.blocks + self._allocate(state, needed)
        return True

    def _allocate(self, state: RequestState, needed: int) -> list[int]:
        """Allocate `needed` blocks, which must be available, and some ahead where there are plenty."""
        growth = max(1, min(_GROWTH, _GROWTH_TOKENS // self.pool.block_size))
        ahead = min(needed + growth, self._num_blocks(state.max_length) - len(state.blocks))
        if self.pool.num_available - ahead < self.pool.num_blocks // 2:
            ahead = needed
        blocks = self.pool.allocate(ahead, after=state.blocks[-1] if state.blocks else None)
        assert blocks is not None, (ahead, self.pool.num_available)
        return blocks

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def _set_one_back(self, state: RequestState) -> bool:
        """Preempt the least important request; False when that is `state` itself. It is in no chunk of this step yet:
        decoding requests are scheduled by importance, and prefilling ones never lack room."""
        victim = self.running.pop()
        self._give_back(victim)
        # The log-probabilities will be recomputed.
        victim.prompt_logprobs.clear()
        self.num_preemptions += 1
        victim.num_preemptions += 1
        insort(self.waiting, victim, key=_rank)
        return victim is not state

    def _give_back(self, state: RequestState) -> None:
        self.pool.release(state.blocks)
        state.blocks = []
        state.num_computed = state.num_published = 0


def _rank(state: RequestState) -> tuple[int, int]:
    return state.request.priority, state.number
