"""What is done again, what is refused and for how long, and that lost requests are done again one at a time."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable

import pytest

from deployments.errors import ContentRefusedError, StageLostError
from deployments.metrics import QUARANTINED, RETRIES
from deployments.quarantine import Quarantine, digests
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


def _given(request: AnyRequest) -> Callable[[], Awaitable[AnyRequest]]:
    async def give() -> AnyRequest:
        return request

    return give


class _Attempts:
    """Ends as told, one after the other."""

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
        await quarantine.run(_Attempts(StageLostError("1"), StageLostError("2")), _given(request))
    assert isinstance(caught.value.__cause__, StageLostError)


def test_what_is_lost_once_is_done_again_and_nothing_is_held_against_it() -> None:
    async def run() -> None:
        quarantine, attempts = Quarantine(60), _Attempts(StageLostError("gone"), "done")
        assert await quarantine.run(attempts, _given(POISON)) == "done"
        assert attempts.num_made == 2
        await quarantine.check(POISON)

    asyncio.run(run())


def test_what_is_done_again_and_what_is_refused_is_counted() -> None:
    now, recorder = [0.0], FakeRecorder()

    async def run() -> None:
        quarantine = Quarantine(60, clock=lambda: now[0], recorder=recorder)
        assert await quarantine.run(_Attempts("done"), _given(POISON)) == "done"
        assert not recorder.counted
        await quarantine.run(_Attempts(StageLostError("gone"), "done"), _given(POISON))
        assert recorder.counted[RETRIES, ()] == 1
        assert recorder.readings() == {(QUARANTINED, ()): 0}
        await _kill_twice(quarantine, _request(ImagePart(b"a"), ImagePart(b"b")))
        # Known before it is tried again.
        with pytest.raises(ContentRefusedError):
            await quarantine.run(_Attempts(StageLostError("gone")), _given(_request(ImagePart(b"a"))))

    asyncio.run(run())
    assert recorder.counted[RETRIES, ()] == 2
    assert recorder.readings() == {(QUARANTINED, ()): 2}
    now[0] = 60.0
    assert recorder.readings() == {(QUARANTINED, ()): 0}


@pytest.mark.parametrize("error", [EngineError("broken"), ContentRefusedError()])
def test_what_fails_without_a_loss_is_not_done_again(error: Exception) -> None:
    attempts = _Attempts(error)
    with pytest.raises(type(error)):
        asyncio.run(Quarantine(60).run(attempts, _given(POISON)))
    assert attempts.num_made == 1


def test_what_is_lost_twice_is_refused_until_its_time_is_up() -> None:
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


def test_the_oldest_is_forgotten_first_when_there_are_too_many() -> None:
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


def test_lost_requests_are_done_again_one_at_a_time_and_copies_of_a_poisonous_one_not_at_all() -> None:
    """Four were on the replica, two of them poison: the second copy is refused without a third kill."""
    on_replica: set[str] = set()
    kills = 0

    def on(quarantine: Quarantine, name: str, request: GenerationRequest, lost: list[str]) -> Awaitable[str]:
        async def attempt() -> str:
            nonlocal kills
            if name not in lost:
                # All of them were beside each other at first.
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

        return quarantine.run(attempt, _given(request))

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


def test_of_too_many_lost_requests_the_rest_is_told_at_once() -> None:
    async def run() -> None:
        quarantine = Quarantine(60, max_waiting=1)
        begun = asyncio.Event()

        async def hang() -> str:
            if not begun.is_set():
                begun.set()
                raise StageLostError("gone")
            return await asyncio.Event().wait() and ""

        first = asyncio.create_task(quarantine.run(hang, _given(POISON)))
        await begun.wait()
        attempts = _Attempts(StageLostError("gone"))
        with pytest.raises(StageLostError):
            await quarantine.run(attempts, _given(POISON))
        # Whoever waits for it leaves: its place is free again.
        first.cancel()
        await asyncio.wait([first])
        assert await quarantine.run(_Attempts(StageLostError("gone"), "done"), _given(POISON)) == "done"

    asyncio.run(run())


def test_content_is_the_pictures_or_else_the_prompt() -> None:
    assert digests(POISON) == {hashlib.sha256(b"poison").hexdigest()}
    assert len(digests(_request(ImagePart(b"a"), ImagePart(b"b"), ImagePart(b"a")))) == 2
    url = ImageUrl("https://a.example/x.png")
    assert digests(_request(url)) == digests(_request(url, TextPart("more"))) != digests(_request(ImageUrl("b")))
    texts: list[AnyRequest] = [
        _request(TextPart("a")),
        _request(TextPart("b")),
        # Half of a pair, which has no bytes of its own.
        _request(TextPart("\ud83d")),
        CompletionRequest("id", "a", SamplingParams()),
        CompletionRequest("id", (1, 2), SamplingParams()),
    ]
    found = [digests(request) for request in texts]
    assert all(len(each) == 1 for each in found)
    assert len(set().union(*found)) == len(texts)
    assert digests(_request(TextPart("a"), request_id="other")) == found[0]
