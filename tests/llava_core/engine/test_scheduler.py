"""Scheduling with a fake model that maps each token to a digest of everything before it; every step is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.engine.blocks import BlockPool
from llava_core.engine.config import EngineConfig
from llava_core.engine.prefix import ImageSpan
from llava_core.engine.request import RequestState
from llava_core.engine.scheduler import Chunk, Scheduler
from llava_core.types import EngineRequest, SamplingParams

# Pieces from which prompts are assembled, so that many share a prefix: words, and pictures given by their digests.
PIECES: tuple[tuple[int, ...] | str, ...] = ((1, 2, 3), (4,), (5, 6, 7, 8, 9), "cat", "dog")
PICTURE_TOKENS = 4


class Silent:
    """A detokenizer that never stops anything."""

    is_stopped = False


def lay_out(pieces: Sequence[tuple[int, ...] | str]) -> tuple[list[int], tuple[ImageSpan, ...]]:
    tokens: list[int] = []
    images: list[ImageSpan] = []
    for piece in pieces:
        if isinstance(piece, str):
            images.append(ImageSpan(len(tokens), len(tokens) + PICTURE_TOKENS, piece, None))
            tokens += [-200] * PICTURE_TOKENS
        else:
            tokens += piece
    return tokens, tuple(images)


def digests(state: RequestState) -> list[int]:
    """Returns a number per token that depends on it and on everything before it, like its keys and values."""
    pictures = {place: image for image in state.images for place in range(image.start, image.stop)}
    found: list[int] = []
    for place, token in enumerate(state.tokens):
        image = pictures.get(place)
        cell = token if image is None else -10 * len(PIECES) * (place - image.start) - PIECES.index(image.digest)
        found.append(hash((found[-1] if found else 0, cell)))
    return found


def rank(state: RequestState) -> tuple[int, int]:
    return state.request.priority, state.number


class World:
    """Runs the scheduled chunks and checks all invariants."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, **options: int) -> None:
        self.config = EngineConfig(**{"max_running": 4, "max_step_tokens": 32, "prefill_chunk": 8, **options})
        self.pool = BlockPool(num_blocks, block_size)
        self.limits = self.config.step_limits("cpu")
        self.scheduler = Scheduler(self.config.max_running, self.limits, self.pool)
        self.states: list[RequestState] = []
        self.answers: dict[int, list[int]] = {}
        self.num_steps = 0
        # The cache's content by slot.
        self.memory: dict[int, int] = {}
        self._numbers = 0

    def add(
        self, pieces: Sequence[Any] | int, max_tokens: int = 3, *, written: int = 0, **request: Any
    ) -> RequestState:
        """Adds a request that arrives with `written` tokens of its answer. It must fit, as admission ensures."""
        number, self._numbers = self._numbers, self._numbers + 1
        prompt, images = lay_out([tuple(range(100, 100 + pieces))] if isinstance(pieces, int) else pieces)
        assert len(prompt) + max_tokens <= self.pool.num_blocks * self.pool.block_size
        state = RequestState(
            request=EngineRequest(str(number), prompt, (), SamplingParams(), **request),
            index=0,
            number=number,
            max_tokens=max_tokens,
            seed=0,
            images=images,
            detokenizer=Silent(),  # type: ignore[arg-type]
            tokens=list(prompt),
        )
        for _ in range(written):
            state.tokens.append(self._next_token(state))
        self.states.append(state)
        self.scheduler.add(state)
        return state

    def abort(self, state: RequestState) -> None:
        self.scheduler.remove(state)
        self.states.remove(state)
        self._check_bookkeeping()

    def step(self) -> list[Chunk]:
        scheduler = self.scheduler
        before = list(scheduler.running)
        num_pending = {state.number: state.num_pending for state in self.states}
        num_available = self.pool.num_available
        chunks = scheduler.schedule()
        self.num_steps += 1
        writing = [state for state in before if num_pending[state.number] == 1]
        self._check_amounts(chunks, writing)
        self._check_blocks(chunks)
        self._check_preempted(chunks, before, writing, num_available)
        self._check_order(before)
        self._check_bookkeeping()
        self._run(chunks)
        self._check_bookkeeping()
        return chunks

    def run(self) -> None:
        """Runs until all answers are complete; limits the number of steps to show that no request starves."""
        limit = self.num_steps + 2 * sum(state.max_length for state in self.states)
        while self.states:
            assert self.step(), "there is work, but nothing was scheduled"
            assert self.num_steps <= limit, "it takes far too long"
        assert (self.pool.num_used, self.scheduler.running, self.scheduler.waiting) == (0, [], [])

    def _next_token(self, state: RequestState) -> int:
        return 200 + digests(state)[-1] % 2

    def _run(self, chunks: list[Chunk]) -> None:
        size = self.pool.block_size
        for chunk in chunks:
            slots = [block * size + offset for block in chunk.state.blocks for offset in range(size)]
            known = digests(chunk.state)
            read = [self.memory.get(slot) for slot in slots[: chunk.start]]
            assert read == known[: chunk.start], "what it counts on is not in the cache"
            self.memory.update(zip(slots[chunk.start : chunk.stop], known[chunk.start : chunk.stop], strict=True))
        for chunk in chunks:
            state = chunk.state
            self.scheduler.computed(chunk)
            if not chunk.is_last:
                continue
            if state.max_tokens:
                state.tokens.append(self._next_token(state))
            if state.num_output == state.max_tokens:
                self.answers[state.number] = state.output_ids
                self.scheduler.remove(state)
                self.states.remove(state)

    def _check_amounts(self, chunks: list[Chunk], writing: list[RequestState]) -> None:
        assert len({chunk.state.number for chunk in chunks}) == len(chunks), "a request is twice in a step"
        assert sum(chunk.length for chunk in chunks) <= self.limits.max_tokens
        answers = [chunk for chunk in chunks if chunk.state in writing]
        assert all(chunk.length == 1 for chunk in answers)
        if answers:
            assert sum(chunk.length for chunk in chunks) - len(answers) <= self.limits.prefill_chunk
        for state in writing:
            assert any(chunk.state is state for chunk in answers) or not state.is_running, "an answer stood still"

    def _check_blocks(self, chunks: list[Chunk]) -> None:
        size = self.pool.block_size
        for chunk in chunks:
            state = chunk.state
            assert state in self.scheduler.running
            assert chunk.start == state.num_computed
            assert chunk.start < chunk.stop <= len(state.tokens)
            assert chunk.stop <= len(state.blocks) * size
            written = set(state.blocks[chunk.start // size :])
            for other in self.scheduler.running:
                assert other is state or not written & set(other.blocks), "others see what is being written"

    def _check_preempted(
        self, chunks: list[Chunk], before: list[RequestState], writing: list[RequestState], num_available: int
    ) -> None:
        preempted = [state for state in before if not state.is_running]
        # Only the least important ones, and only if there was no block for every answer that needed one.
        assert preempted == before[len(before) - len(preempted) :]
        assert all(state in self.scheduler.waiting and not state.num_computed for state in preempted)
        if preempted:
            size = self.pool.block_size
            assert num_available < sum((len(state.tokens) - 1) % size == 0 for state in writing)
            assert all(chunk.state in before for chunk in chunks), "one is set back, and another begins"

    def _check_order(self, before: list[RequestState]) -> None:
        """Checks that no request is overtaken unless it waits for a prefix that another is reading."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert running == sorted(running, key=rank)
        assert waiting == sorted(waiting, key=rank)
        assert len(running) <= self.config.max_running
        admitted = [state for state in running if state not in before]
        for state in admitted:
            # Tokens whose logits are wanted are never taken from the cache.
            assert state.num_computed < (state.request.score_from or len(state.tokens))
        for state in waiting:
            if any(rank(other) > rank(state) for other in admitted):
                assert any(self._reads_for(other, state) for other in running), "it was overtaken"

    def _reads_for(self, reader: RequestState, waiting: RequestState) -> bool:
        """Tells whether the two share a longer prefix than the reader has read so far."""
        size, alike = self.pool.block_size, 0
        for one, other in zip(digests(reader), digests(waiting), strict=False):
            if one != other:
                break
            alike += 1
        return reader.num_computed // size < alike // size

    def _check_bookkeeping(self) -> None:
        self.pool.check_integrity()
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert sorted(map(rank, self.states)) == sorted(map(rank, [*running, *waiting]))
        assert self.pool.num_used == len({block for state in running for block in state.blocks})
        assert all(len(set(state.blocks)) == len(state.blocks) > 0 for state in running)
        assert not any(state.blocks or state.num_computed for state in waiting)


pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4)
arrivals = st.fixed_dictionaries(
    {
        "pieces": pieces,
        "max_tokens": st.just(0) | st.integers(1, 30) | st.integers(1, 30),
        "written": st.just(0) | st.integers(0, 5),
        "priority": st.sampled_from([0, 0, 0, -1, 1]),
    }
)
# Events: several requests arrive together, a few steps pass, the n-th request is aborted.
events = st.one_of(
    st.lists(arrivals, min_size=2, max_size=4),
    st.integers(1, 9).map(lambda num: ("steps", num)),
    st.integers(1, 9).map(lambda num: ("steps", num)),
    st.integers(0, 5),
)


def apply_event(world: World, event: Any) -> None:
    if isinstance(event, list):
        for arrival in event:
            arrive(world, **arrival)
    elif isinstance(event, tuple):
        for _ in range(event[1]):
            world.step()
    elif world.states:
        world.abort(world.states[event % len(world.states)])


def arrive(world: World, *, pieces: list[Any], max_tokens: int, written: int, priority: int) -> None:
    """Adds a request that is made to fit: its answer is shortened, and scoring starts after its pictures."""
    prompt, images = lay_out(pieces)
    max_tokens = min(max_tokens, world.pool.num_blocks * world.pool.block_size - len(prompt))
    first = max((image.stop for image in images), default=1)
    if max_tokens > 0:
        world.add(pieces, max_tokens, written=min(written, max_tokens - 1), priority=priority)
    elif max_tokens == 0 and first < len(prompt):
        world.add(pieces, 0, priority=priority, score_from=first)


@settings(max_examples=200)
@given(
    num_tokens=st.integers(16, 50),
    block_size=st.sampled_from([1, 2, 3, 4]),
    max_running=st.integers(1, 5),
    prefill_chunk=st.integers(1, 9),
    slack=st.integers(0, 20),
    script=st.lists(events, min_size=4, max_size=16),
)
def test_any_sequence_of_events_completes_and_keeps_all_invariants(
    num_tokens: int, block_size: int, max_running: int, prefill_chunk: int, slack: int, script: list[Any]
) -> None:
    limits = {"max_running": max_running, "prefill_chunk": prefill_chunk}
    num_blocks = num_tokens // block_size
    world = World(num_blocks, block_size, max_step_tokens=max_running + prefill_chunk + slack, **limits)
    for event in script:
        apply_event(world, event)
    world.run()


def lengths(chunks: list[Chunk]) -> dict[int, int]:
    """Returns the number of tokens in a step by request number."""
    return {chunk.state.number: chunk.length for chunk in chunks}


def test_equal_priorities_start_in_order_of_arrival() -> None:
    world = World(max_running=2)
    for _ in range(3):
        world.add(2, max_tokens=2)
    assert lengths(world.step()) == {0: 2, 1: 2}
    world.run()


def test_the_lower_priority_number_starts_first() -> None:
    world = World(max_running=1)
    for priority in (1, 0, -1, 0):
        world.add(2, max_tokens=1, priority=priority)
    assert [list(lengths(world.step())) for _ in range(4)] == [[2], [1], [3], [0]]


def test_a_long_prompt_fills_whole_steps_while_no_answer_runs() -> None:
    world = World(max_step_tokens=12)
    world.add(30, max_tokens=2)
    assert [lengths(world.step()) for _ in range(4)] == [{0: 12}, {0: 12}, {0: 6}, {0: 1}]


def test_prompts_are_read_in_small_chunks_beside_answers() -> None:
    world = World(prefill_chunk=8)
    world.add(2, max_tokens=4)
    world.step()
    world.add([(1, 2, 3)] * 4, max_tokens=2)
    assert [lengths(world.step()) for _ in range(4)] == [{0: 1, 1: 8}, {0: 1, 1: 4}, {0: 1, 1: 1}, {}]


def test_answers_advance_even_beside_more_important_prompts() -> None:
    world = World(prefill_chunk=4)
    world.add(2, max_tokens=9, priority=1)
    world.step()
    world.add([(1, 2, 3)] * 3, priority=0)
    assert [lengths(world.step()) for _ in range(3)] == [{0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 1}]


def test_several_prompts_share_a_step_in_order() -> None:
    world = World(max_step_tokens=16)
    for first in (10, 20, 30):
        world.add([tuple(range(first, first + 7))])
    assert [lengths(world.step()) for _ in range(2)] == [{0: 7, 1: 7, 2: 2}, {0: 1, 1: 1, 2: 5}]


def test_a_request_waits_for_a_shared_prefix_that_is_being_read() -> None:
    world = World(max_step_tokens=12)
    world.add(20)
    alike, other = world.add(20), world.add([(1, 2, 3)])
    assert lengths(world.step()) == {0: 12}
    assert lengths(world.step()) == {0: 8, 2: 3}
    assert lengths(world.step()) == {0: 1, 1: 4, 2: 1}
    assert (alike.num_cached, other.num_cached, world.scheduler.num_cached) == (16, 0, 16)
    world.run()
    assert world.answers[0] == world.answers[1]


def test_answers_to_one_prompt_share_its_prefill() -> None:
    world = World()
    for _ in range(4):
        world.add(21)
    assert [lengths(world.step()) for _ in range(2)] == [{0: 21}, {0: 1, 1: 1, 2: 1, 3: 1}]
    assert world.scheduler.num_cached == 60


def test_a_request_waits_for_a_shared_prefix_only_until_it_is_cached() -> None:
    world = World(max_step_tokens=12)
    beginning = tuple(range(10, 18))
    world.add([beginning, tuple(range(20, 50))])
    world.add([beginning, tuple(range(60, 70))])
    # Eight tokens are shared, and after the first step they are in the cache.
    assert [lengths(world.step()) for _ in range(4)] == [{0: 12}, {0: 12}, {0: 12}, {0: 2, 1: 10}]


def test_a_waiting_request_takes_over_an_aborted_prefill() -> None:
    world = World(max_step_tokens=12)
    reading, waiting = world.add(20), world.add(20)
    world.step()
    world.abort(reading)
    assert lengths(world.step()) == {1: 8}
    assert waiting.num_cached == 12


def test_no_request_waits_for_disowned_blocks() -> None:
    world = World(max_step_tokens=12)
    reading = world.add(30)
    world.step()
    # As happens when a request with the same prefix fails.
    world.pool.disown(reading.blocks)
    world.add(12, max_tokens=1)
    assert [lengths(world.step()) for _ in range(3)] == [{0: 12}, {0: 6, 1: 6}, {0: 1, 1: 6}]


def test_the_same_words_about_another_picture_are_not_shared() -> None:
    world = World()
    world.add(["cat", (1, 2, 3)])
    world.add(["dog", (1, 2, 3)])
    assert lengths(world.step()) == {0: 7, 1: 7}
    world.run()
    assert world.scheduler.num_cached == 0


def test_a_follow_up_question_reads_only_new_tokens() -> None:
    world = World()
    first = world.add(["cat", (1, 2, 3)], max_tokens=6)
    world.run()
    second = world.add(["cat", (1, 2, 3), tuple(world.answers[first.number]), (5, 6, 7, 8, 9)])
    world.step()
    # The answer's last token was never computed: 12 of 18 tokens are in full blocks.
    assert second.num_cached == 12


def test_scored_tokens_are_computed_even_if_cached() -> None:
    world = World()
    world.add(20)
    world.run()
    world.add(20, max_tokens=0, score_from=10)
    (chunk,) = world.step()
    assert (chunk.start, chunk.stop) == (8, 20)


def tight_world(*, asking: int) -> tuple[World, RequestState, RequestState]:
    """Builds a world with two answers that cannot both be completed in the cache; the second is the first to ask for a
    block when none is free."""
    world = World(num_blocks=7, block_size=2)
    first = world.add([(4,)], max_tokens=13)
    world.step()
    return world, first, world.add([(5,)], max_tokens=13, priority=asking)


def test_the_least_important_is_preempted_and_resumes_later() -> None:
    world, first, asking = tight_world(asking=1)
    while not world.scheduler.num_preemptions:
        world.step()
    assert world.scheduler.waiting == [asking]
    # Its partial answer is kept.
    assert (asking.num_output, asking.num_pending) == (6, 7)
    world.run()
    assert (first.num_preemptions, asking.num_preemptions) == (0, 1)
    assert [len(world.answers[number]) for number in range(2)] == [13, 13]


def test_importance_decides_preemption_not_who_needs_a_block() -> None:
    world, first, asking = tight_world(asking=-1)
    while not world.scheduler.num_preemptions:
        world.step()
    assert world.scheduler.waiting == [first]
    assert asking.num_output == 7
    world.run()
    assert asking.num_preemptions == 0
    assert [len(world.answers[number]) for number in range(2)] == [13, 13]


def test_a_preempted_request_finds_its_own_prefix_in_the_cache() -> None:
    world = World(num_blocks=10, block_size=2)
    world.add([(1, 2, 3)], max_tokens=9)
    late = world.add([(5, 6, 7, 8, 9)], max_tokens=12)
    world.run()
    assert (late.num_preemptions, world.scheduler.num_cached) == (1, 8)
    # Its caller is told only what the first prefill found in the cache.
    assert late.num_cached == 0


def test_no_request_starts_that_would_block_running_ones() -> None:
    world = World(num_blocks=8, block_size=2)
    world.add([(1, 2, 3)], max_tokens=9)
    world.step()
    # Six blocks are left: enough to read twelve tokens, but then the running answer could not grow.
    assert world.pool.num_available == 6
    waiting = world.add([tuple(range(4, 16))], max_tokens=1)
    world.step()
    assert world.scheduler.waiting == [waiting]
    world.abort(waiting)
    world.add([(4, 5)], max_tokens=1)
    world.step()
    assert world.scheduler.waiting == []


def test_a_request_that_does_not_fit_yet_is_not_overtaken() -> None:
    world = World(num_blocks=8, block_size=2)
    world.add([(1, 2, 3)], max_tokens=9)
    world.step()
    large = world.add(14, max_tokens=2)
    small = world.add([(4,)], max_tokens=1)
    world.step()
    assert world.scheduler.waiting == [large, small]
    world.run()


def test_the_blocks_of_an_answer_are_adjacent() -> None:
    world = World(num_blocks=64, block_size=2)
    states = [world.add([(first,)], max_tokens=10) for first in (10, 20)]
    for _ in range(9):
        world.step()
    assert [state.blocks for state in states] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_an_answer_grows_into_adjacent_blocks() -> None:
    world = World(num_blocks=64, block_size=2)
    state, neighbour = (world.add([(first,)], max_tokens=20) for first in (10, 20))
    world.step()
    world.abort(neighbour)
    for _ in range(12):
        world.step()
    # The neighbour's blocks were freed last.
    assert state.blocks == list(range(10))


def test_preallocation_stops_at_what_the_longest_answer_needs() -> None:
    world = World(num_blocks=64, block_size=2)
    state = world.add([(1, 2, 3)], max_tokens=2)
    world.step()
    assert len(state.blocks) == 3


def test_an_abort_frees_everything_in_any_state() -> None:
    world = World(max_running=2, max_step_tokens=16)
    reading = world.add(30)
    writing, waiting = world.add([(1, 2, 3)]), world.add([(4,)])
    world.step()
    for state in (writing, waiting, reading):
        world.abort(state)
    assert (world.pool.num_used, world.step()) == (0, [])


def test_unread_prompt_tokens_are_counted_for_all_requests() -> None:
    world = World(max_running=2, max_step_tokens=16)
    for first, size in ((100, 10), (200, 20), (300, 7)):
        world.add([tuple(range(first, first + size))])
    unread = [world.scheduler.num_unread]
    for _ in range(3):
        world.step()
        unread.append(world.scheduler.num_unread)
    # The second is read in three steps, in chunks of 8 beside an answer; there is no slot for the third.
    assert unread == [37, 21, 13, 7]


def test_without_requests_nothing_is_scheduled() -> None:
    assert World().step() == []


def test_an_unimportant_prompt_does_not_delay_an_urgent_one() -> None:
    world = World(max_step_tokens=12)
    world.add(100, priority=5)
    world.step()
    urgent = world.add([(1, 2, 3)], priority=0)
    world.step()
    assert urgent.is_running


def test_preallocated_blocks_do_not_keep_others_out() -> None:
    world = World(num_blocks=7, block_size=2)
    world.add([(4,)], max_tokens=13)
    world.add([(5, 6, 7)], max_tokens=1)
    world.step()
    assert world.scheduler.waiting == []


def test_no_request_waits_for_a_less_important_reader() -> None:
    world = World(max_step_tokens=12)
    world.add(60, priority=5)
    world.step()
    urgent = world.add(60, priority=0)
    for _ in range(3):
        world.step()
    assert urgent.is_running
