"""What is retried, what is refused and for how long, and that lost requests are retried one at a time."""

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable

import pytest

from deployments.errors import ContentRefusedError, StageLostError, StageSilentError
from deployments.graph.quarantine import Quarantine, digests
from deployments.metrics import QUARANTINED, RETRIES
from llava_core.errors import EngineError
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    ImageUrl,
    Message,
    SamplingParams,
    TextPart,
)
from tests.deployments.fakes import FakeRecorder


def _request(*parts: TextPart | ImagePart | ImageUrl, request_id: str = "id") -> GenerationRequest:
    return GenerationRequest(request_id, (Message("user", parts),), SamplingParams())


POISON = _request(ImagePart(b"poison"), TextPart("What?"))


def _returning(request: AnyRequest) -> Callable[[], Awaitable[AnyRequest]]:
    async def give() -> AnyRequest:
        return request

    return give


class _Attempts:
    """Attempts that end as told, one after the other."""

    def __init__(self, *ends: Exception | str) -> None:
        self._ends = list(ends)
        self.num_made = 0

    async def __call__(self) -> str:
        end = self._ends[self.num_made]
        self.num_made += 1
        if isinstance(end, Exception):
            raise end
        return end


async def _kill_twice(quarantine: Quarantine, request: AnyRequest) -> None:
    with pytest.raises(ContentRefusedError) as caught:
        await quarantine.case(_returning(request)).run(_Attempts(StageLostError("1"), StageLostError("2")))
    assert isinstance(caught.value.__cause__, StageLostError)


def test_a_request_lost_once_is_retried_and_not_quarantined() -> None:
    async def run() -> None:
        quarantine, attempts = Quarantine(60), _Attempts(StageLostError("gone"), "done")
        assert await quarantine.case(_returning(POISON)).run(attempts) == "done"
        assert attempts.num_made == 2
        await quarantine.check(POISON)

    asyncio.run(run())


def test_retries_and_refusals_are_counted() -> None:
    now, recorder = [0.0], FakeRecorder()

    async def run() -> None:
        quarantine = Quarantine(60, clock=lambda: now[0], recorder=recorder)
        assert await quarantine.case(_returning(POISON)).run(_Attempts("done")) == "done"
        assert not recorder.counted
        await quarantine.case(_returning(POISON)).run(_Attempts(StageLostError("gone"), "done"))
        assert recorder.counted[RETRIES, ("earlier", "waiting")] == 1
        assert recorder.readings() == {(QUARANTINED, ()): 0}
        await _kill_twice(quarantine, _request(ImagePart(b"a"), ImagePart(b"b")))
        # The content is known to kill before it is retried.
        with pytest.raises(ContentRefusedError):
            await quarantine.case(_returning(_request(ImagePart(b"a")))).run(_Attempts(StageLostError("gone")))

    asyncio.run(run())
    assert recorder.counted[RETRIES, ("earlier", "waiting")] == 2
    assert recorder.readings() == {(QUARANTINED, ()): 2}
    now[0] = 60.0
    assert recorder.readings() == {(QUARANTINED, ()): 0}


@pytest.mark.parametrize("error", [EngineError("broken"), ContentRefusedError()])
def test_an_error_that_is_not_a_loss_is_not_retried(error: Exception) -> None:
    attempts = _Attempts(error)
    with pytest.raises(type(error)):
        asyncio.run(Quarantine(60).case(_returning(POISON)).run(attempts))
    assert attempts.num_made == 1


def test_content_lost_twice_is_refused_for_a_limited_time() -> None:
    now = [0.0]

    async def run() -> None:
        quarantine = Quarantine(60, clock=lambda: now[0])
        await _kill_twice(quarantine, POISON)
        again = _request(TextPart("Something else"), ImagePart(b"poison"), request_id="other")
        with pytest.raises(ContentRefusedError):
            await quarantine.check(again)
        await quarantine.check(_request(ImagePart(b"harmless"), TextPart("What?")))
        now[0] = 60.0
        await quarantine.check(again)

    asyncio.run(run())


def test_the_oldest_entry_is_evicted_first() -> None:
    async def run() -> None:
        quarantine = Quarantine(60, max_entries=2)
        requests = [_request(ImagePart(bytes([number]))) for number in range(3)]
        for request in requests:
            await _kill_twice(quarantine, request)
        await quarantine.check(requests[0])
        for request in requests[1:]:
            with pytest.raises(ContentRefusedError):
                await quarantine.check(request)

    asyncio.run(run())


def test_lost_requests_are_retried_one_at_a_time_but_not_copies_of_poison() -> None:
    """Four requests were on the replica, two of them poison: the second copy is refused without a third kill."""
    on_replica: set[str] = set()
    kills = 0

    def on(quarantine: Quarantine, name: str, request: GenerationRequest, lost: list[str]) -> Awaitable[str]:
        async def attempt() -> str:
            nonlocal kills
            if name not in lost:
                # All of them ran concurrently at first.
                lost.append(name)
                raise StageLostError("gone")
            assert not on_replica
            on_replica.add(name)
            await asyncio.sleep(0)
            on_replica.remove(name)
            if request is POISON:
                kills += 1
                raise StageLostError("gone again")
            return name

        return quarantine.case(_returning(request)).run(attempt)

    async def run() -> list[str | BaseException]:
        quarantine = Quarantine(60)
        other = _request(ImagePart(b"harmless"))
        requests = {"poison": POISON, "copy": POISON, "first": other, "second": other}
        lost: list[str] = []
        running = [on(quarantine, name, request, lost) for name, request in requests.items()]
        return await asyncio.gather(*running, return_exceptions=True)

    poison, copy, *others = asyncio.run(run())
    assert isinstance(poison, ContentRefusedError)
    assert isinstance(copy, ContentRefusedError)
    assert others == ["first", "second"]
    assert kills == 1


LOST = StageLostError("gone", "generator")


def test_answers_that_had_begun_resume_at_once_and_concurrently() -> None:
    recorder = FakeRecorder()

    async def run() -> None:
        quarantine = Quarantine(60, max_waiting=0, recorder=recorder)
        together = asyncio.Barrier(8)

        async def attempt() -> str:
            await together.wait()
            return "done"

        cases = [quarantine.case(_returning(POISON)) for _ in range(8)]
        found = await asyncio.gather(*(case.again(attempt, LOST, phase="streaming") for case in cases))
        assert found == ["done"] * 8

    asyncio.run(run())
    assert recorder.counted == {(RETRIES, ("generator", "streaming")): 8}


def test_an_answer_lost_again_waits_its_turn_like_one_not_begun() -> None:
    async def run() -> None:
        quarantine = Quarantine(60)
        first, second = (quarantine.case(_returning(POISON)) for _ in range(2))
        hangs, is_in_turn = asyncio.Event(), asyncio.Event()

        async def attempt() -> str:
            is_in_turn.set()
            await hangs.wait()
            return "done"

        waiting = asyncio.create_task(first.again(attempt, LOST, phase="waiting"))
        await is_in_turn.wait()
        made = _Attempts(LOST, "done")
        again = asyncio.create_task(second.again(made, LOST, phase="streaming"))
        while not made.num_made:
            await asyncio.sleep(0)
        # At first concurrently with the other, and then after it.
        done, _ = await asyncio.wait([again], timeout=0.05)
        assert not done
        assert made.num_made == 1
        hangs.set()
        assert [await waiting, await again] == ["done", "done"]

    asyncio.run(run())


def test_a_request_lost_beside_a_resumed_answer_is_not_blamed() -> None:
    """An answer may kill wherever it is resumed; a request that was alone until then is innocent."""

    async def run() -> None:
        quarantine = Quarantine(60)
        is_on_its_way, is_beside = asyncio.Event(), asyncio.Event()
        innocent = _request(ImagePart(b"harmless"))

        async def attempt() -> str:
            if is_beside.is_set():
                return "done"
            is_on_its_way.set()
            await is_beside.wait()
            raise LOST

        case = quarantine.case(_returning(innocent))
        waiting = asyncio.create_task(case.again(attempt, LOST, phase="waiting"))
        await is_on_its_way.wait()

        async def kill() -> str:
            is_beside.set()
            raise LOST

        with pytest.raises(ContentRefusedError):
            await quarantine.case(_returning(POISON)).again(kill, LOST, phase="streaming")
        assert await waiting == "done"
        await quarantine.check(innocent)

    asyncio.run(run())


def test_an_answer_that_keeps_killing_is_eventually_refused() -> None:
    async def run() -> int:
        quarantine, num_killed = Quarantine(60), 0
        case = quarantine.case(_returning(POISON))
        attempts = _Attempts(*["a piece"] * 9)
        await case.run(attempts)
        with contextlib.suppress(ContentRefusedError):
            while num_killed < 9:
                num_killed += 1
                await case.again(attempts, LOST, phase="streaming")
        with pytest.raises(ContentRefusedError):
            await quarantine.check(POISON)
        return num_killed

    assert asyncio.run(run()) == 4


def test_lost_requests_beyond_the_queue_limit_fail_at_once() -> None:
    async def run() -> None:
        quarantine = Quarantine(60, max_waiting=1)
        begun = asyncio.Event()

        async def hang() -> str:
            if not begun.is_set():
                begun.set()
                raise StageLostError("gone")
            return await asyncio.Event().wait() and ""

        first = asyncio.create_task(quarantine.case(_returning(POISON)).run(hang))
        await begun.wait()
        attempts = _Attempts(StageLostError("gone"))
        with pytest.raises(StageLostError):
            await quarantine.case(_returning(POISON)).run(attempts)
        # Its client leaves: its turn is free again.
        first.cancel()
        await asyncio.wait([first])
        assert await quarantine.case(_returning(POISON)).run(_Attempts(StageLostError("gone"), "done")) == "done"

    asyncio.run(run())


def test_content_is_identified_by_its_pictures_or_else_its_prompt() -> None:
    assert digests(POISON) == {hashlib.sha256(b"poison").hexdigest()}
    assert len(digests(_request(ImagePart(b"a"), ImagePart(b"b"), ImagePart(b"a")))) == 2
    url = ImageUrl("https://a.example/x.png")
    assert digests(_request(url)) == digests(_request(url, TextPart("more"))) != digests(_request(ImageUrl("b")))
    texts: list[AnyRequest] = [
        _request(TextPart("a")),
        _request(TextPart("b")),
        # A lone surrogate, which cannot be encoded.
        _request(TextPart("\ud83d")),
        CompletionRequest("id", "a", SamplingParams()),
        CompletionRequest("id", (1, 2), SamplingParams()),
    ]
    found = [digests(request) for request in texts]
    assert all(len(each) == 1 for each in found)
    assert len(set().union(*found)) == len(texts)
    assert digests(_request(TextPart("a"), request_id="other")) == found[0]


def test_a_request_that_meets_silence_is_not_quarantined() -> None:
    async def run() -> None:
        quarantine = Quarantine(60)
        with pytest.raises(StageSilentError):
            await quarantine.case(_returning(POISON)).run(_Attempts(StageLostError("1"), StageSilentError("2")))
        await quarantine.check(POISON)

    asyncio.run(run())


def test_requests_that_met_silence_are_retried_at_once_and_concurrently() -> None:
    """A lost host may have taken many requests along, and each of them may have to wait for another silence."""

    async def run() -> None:
        quarantine, together = Quarantine(60, max_waiting=0), asyncio.Barrier(4)

        async def attempt(ends: list[Exception]) -> str:
            if ends:
                raise ends.pop()
            await together.wait()
            return "done"

        def done_again() -> Awaitable[str]:
            ends: list[Exception] = [StageSilentError(), StageSilentError()]
            return quarantine.case(_returning(POISON)).run(lambda: attempt(ends))

        async with asyncio.timeout(20):
            assert await asyncio.gather(*(done_again() for _ in range(4))) == ["done"] * 4

    asyncio.run(run())
