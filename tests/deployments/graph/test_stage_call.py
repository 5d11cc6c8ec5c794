"""Calls whose replica, or what it needs, is unreachable: callers detect that, but only where nobody answers."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayError

from deployments.errors import StageSilentError, StageUnavailableError
from deployments.graph import stage_call
from deployments.graph.affinity import new_session
from deployments.graph.handoff import LocalHandoff
from deployments.graph.sent_calls import SENT_CALLS, Whereabouts
from deployments.graph.stage_call import StageCall, UnaryCall, unless_out_of_reach
from tests.deployments.fakes import FakeHandle

ASKED_AFTER_S, SILENCE_S = 0.02, 0.1


@pytest.fixture(autouse=True)
def _short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_call, "ASKED_AFTER_S", ASKED_AFTER_S)
    monkeypatch.setattr(stage_call, "SILENCE_S", SILENCE_S)
    monkeypatch.setattr(stage_call, "_FIRST_SIGNS_S", SILENCE_S / 2)


class _Replica:
    """A replica that answers, after a while or never, or is dead."""

    node_id = "node"

    def __init__(self, *, after_s: float = 0.0, is_dead: bool = False) -> None:
        self._after_s, self._is_dead = after_s, is_dead
        self.num_asked = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.num_asked += 1
        await asyncio.sleep(self._after_s)
        if self._is_dead:
            raise ActorDiedError
        return 1


def _unreachable() -> _Replica:
    return _Replica(after_s=600)


class _Handoff(LocalHandoff):
    """A handoff in which calls begin and results are made when the test says so."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.made = asyncio.Event()

    async def give(self, response: Any) -> object:
        await self.begun.wait()
        return response

    def is_made(self, given: object) -> bool:
        return self.made.is_set()


class _Call:
    """A call of a stage, and its router's actions."""

    def __init__(self) -> None:
        self.session, self.handle, self.handoff = new_session(), FakeHandle(prepare=lambda: "made"), _Handoff()
        stage: Any = self.handle
        self.call = UnaryCall("earlier", stage.options(method_name="prepare"), self.session, handoff=self.handoff)

    def route(self, *replicas: _Replica, is_sent: bool = False) -> None:
        where = Whereabouts(lambda: replicas, is_sent)
        SENT_CALLS.note(self.handle.deployment_name, self.session.request, where)


def _run(test: Callable[[_Call], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20):
            call = _Call()
            try:
                await test(call)
            finally:
                call.call.close(is_over=False)

    asyncio.run(run())
    assert not SENT_CALLS._watched


@contextlib.contextmanager
def _detected_in_time() -> Iterator[None]:
    """Check that a loss is detected within one silence after the first probe."""
    began = asyncio.get_running_loop().time()
    yield
    assert SILENCE_S < asyncio.get_running_loop().time() - began < 5


async def _never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_silent_replica_has_lost_its_call(*, is_begun: bool) -> None:
    async def test(it: _Call) -> None:
        it.route(_unreachable(), is_sent=True)
        if is_begun:
            it.handoff.begun.set()
        with _detected_in_time(), pytest.raises(StageSilentError) as caught:
            await unless_out_of_reach(_never(), [it.call])
        assert caught.value.stage == "earlier"

    _run(test)


def test_a_replica_that_is_busy_for_long_is_probed_repeatedly() -> None:
    async def test(it: _Call) -> None:
        replica = _Replica(after_s=SILENCE_S / 4)
        it.route(replica, is_sent=True)
        it.handoff.begun.set()

        async def asked_often() -> str:
            while replica.num_asked < 5:
                await asyncio.sleep(0)
            return "came"

        assert await unless_out_of_reach(asked_often(), [it.call]) == "came"

    _run(test)


def test_a_reachable_replica_that_never_begins_a_call_has_lost_it() -> None:
    async def test(it: _Call) -> None:
        replica = _Replica()
        it.route(replica, is_sent=True)
        with pytest.raises(StageSilentError):
            await unless_out_of_reach(_never(), [it.call])
        assert replica.num_asked == 2

    _run(test)


def test_a_call_rerouted_to_another_replica_may_still_begin() -> None:
    async def test(it: _Call) -> None:
        async def refused_often() -> None:
            for _ in range(5):
                replica = _Replica()
                it.route(replica, is_sent=True)
                while not replica.num_asked:
                    await asyncio.sleep(0)

        await unless_out_of_reach(refused_often(), [it.call])

    _run(test)


def test_a_call_fails_when_no_replica_is_reachable() -> None:
    async def test(it: _Call) -> None:
        it.route(_unreachable(), _Replica(is_dead=True), _unreachable())
        with _detected_in_time(), pytest.raises(StageUnavailableError):
            await unless_out_of_reach(_never(), [it.call])

    _run(test)


@pytest.mark.parametrize(
    "replicas", [[], [_unreachable(), _Replica()], [_Replica(is_dead=True)]], ids=["none", "full", "dead"]
)
def test_a_call_waits_while_replicas_are_missing_full_or_dead(replicas: list[_Replica]) -> None:
    async def test(it: _Call) -> None:
        it.route(*replicas)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_S + 10 * ASKED_AFTER_S):
                await unless_out_of_reach(_never(), [it.call])
        assert all(replica.num_asked > 1 for replica in replicas)

    _run(test)


def test_only_the_first_unfinished_call_is_probed() -> None:
    async def test(it: _Call) -> None:
        other = _Call()
        try:
            for each in (it, other):
                each.route(_unreachable(), is_sent=True)
                each.handoff.begun.set()
            it.handoff.made.set()
            with pytest.raises(StageSilentError):
                await unless_out_of_reach(_never(), [it.call, other.call])
            other.handoff.made.set()
            # As long as a generator may take.
            wanted = asyncio.sleep(SILENCE_S + 5 * ASKED_AFTER_S, "came")
            assert await unless_out_of_reach(wanted, [it.call, other.call]) == "came"
        finally:
            other.call.close(is_over=True)

    _run(test)


def test_a_failed_call_is_not_waited_for() -> None:
    async def test(it: _Call) -> None:
        async def fail(_response: object) -> object:
            raise ZeroDivisionError

        it.handoff.give = fail  # type: ignore[method-assign]
        stage: Any = it.handle
        failing = UnaryCall("earlier", stage.options(method_name="prepare"), new_session(), handoff=it.handoff)
        await asyncio.wait([failing.given])
        assert failing.is_made()
        failing.close(is_over=True)

    _run(test)


def test_a_replica_that_takes_the_call_during_probes_is_waited_for() -> None:
    async def test(it: _Call) -> None:
        for before_is_sent in (False, True):
            silent = _unreachable()
            it.route(silent, is_sent=before_is_sent)
            check = asyncio.create_task(it.call.check())
            while not silent.num_asked:
                await asyncio.sleep(0)
            it.route(_Replica(), is_sent=True)
            await check

    _run(test)


def test_a_replica_that_fails_to_report_its_queue_length_is_reachable(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(_Replica):
        async def get_queue_len(self, *, deadline_s: float) -> int:
            raise RayError

    async def test(it: _Call) -> None:
        it.route(Broken())
        await it.call.check()

    _run(test)
    assert "failed to report its queue length" in caplog.text


def test_nothing_is_kept_about_a_call_that_could_not_be_made() -> None:
    class Broken(FakeHandle):
        def remote(self, *args: Any) -> Any:
            raise ZeroDivisionError

    handle: Any = Broken(prepare=lambda: "made")
    with pytest.raises(ZeroDivisionError):
        StageCall("earlier", handle, new_session())
    assert not SENT_CALLS._watched


def test_a_silent_stream_is_lost_once_sent_but_not_while_queued() -> None:
    async def run() -> None:
        session, handle = new_session(), FakeHandle(generate=lambda: "made")
        stage: Any = handle
        call = StageCall("generator", stage.options(method_name="generate"), session)
        await call.check_silent()
        SENT_CALLS.note("generate", session.request, Whereabouts(lambda: [_Replica()]))
        await call.check_silent()
        SENT_CALLS.note("generate", session.request, Whereabouts(lambda: [_unreachable()]))
        with pytest.raises(StageUnavailableError):
            await call.check_silent()
        SENT_CALLS.note("generate", session.request, Whereabouts(lambda: [_Replica()], is_sent=True))
        # However long the call has waited before.
        await call.check_silent()
        await asyncio.sleep(SILENCE_S / 2)
        with pytest.raises(StageSilentError) as caught:
            await call.check_silent()
        assert caught.value.stage == "generator"
        call.close(is_over=False)
        assert call.response.is_cancelled

    asyncio.run(run())


def test_cancelling_the_caller_also_cancels_the_awaitable() -> None:
    ended: list[str] = []

    async def wanted() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("wanted")

    async def test(it: _Call) -> None:
        task = asyncio.create_task(unless_out_of_reach(wanted(), [it.call]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["wanted"]

    _run(test)


def test_an_error_of_the_awaitable_is_raised() -> None:
    async def wanted() -> None:
        raise ZeroDivisionError

    async def test(it: _Call) -> None:
        with pytest.raises(ZeroDivisionError):
            await unless_out_of_reach(wanted(), [it.call])

    _run(test)
