"""The controller's table: which worker is chosen, which are forgotten, and what heartbeats change."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from deployments.llava_protocol.table import Worker, WorkerTable
from deployments.metrics import REGISTERED_WORKERS
from deployments.settings.llava_protocol import WorkerArgs
from tests.deployments.fakes import FakeRecorder


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def table(*workers: Worker, draws: Iterator[float] | None = None, clock: Clock | None = None, **args: object):
    draw = (lambda: next(draws)) if draws is not None else (lambda: 0.0)
    made = WorkerTable(WorkerArgs.model_validate(args), clock=clock or Clock(), draw=draw)
    for worker in workers:
        assert asyncio.run(made.register(worker))
    return made


def chosen(made: WorkerTable, count: int, model: str = "m") -> list[str | None]:
    async def choose() -> list[str | None]:
        return [await made.choose(model, f"request {number}") for number in range(count)]

    return asyncio.run(choose())


def names(made: WorkerTable) -> list[str]:
    return [worker.name for worker in asyncio.run(made.workers())]


def lengths(made: WorkerTable) -> dict[str, int]:
    return {worker.name: worker.queue_length for worker in asyncio.run(made.workers())}


def test_the_shortest_queue_per_speed_is_chosen_and_the_first_among_equals() -> None:
    """Computed by hand: queue lengths over speeds, with one more request after each choice."""
    made = table(Worker("a", ("m",), 1, 2), Worker("b", ("m",), 4, 4), Worker("c", ("other",), 9, 0))
    # 2 and 1.00, 1.25, 1.50, 1.75, then 2 and 2.00, then 3 and 2.00.
    assert chosen(made, 6) == ["b", "b", "b", "b", "a", "b"]


def test_a_heartbeat_corrects_what_was_counted() -> None:
    made = table(Worker("a", ("m",)), Worker("b", ("m",)))
    assert chosen(made, 2) == ["a", "b"]
    assert asyncio.run(made.heart_beat("b", 0))
    assert chosen(made, 2) == ["b", "a"]


def test_requests_that_end_are_discounted_for_a_worker_without_heartbeats() -> None:
    made = table(Worker("a", ("m",), is_watched=False), Worker("b", ("m",), queue_length=1))
    assert chosen(made, 1) == ["a"]
    assert lengths(made) == {"a": 1, "b": 1}
    # One that is unknown, and one that is released twice.
    for request in ("never", "request 0", "request 0"):
        asyncio.run(made.release(request))
    assert lengths(made) == {"a": 0, "b": 1}


def test_requests_stay_counted_when_their_worker_reports_its_queue_anew() -> None:
    made = table(Worker("a", ("m",), is_watched=False))
    chosen(made, 2)
    asyncio.run(made.register(Worker("a", ("m",), queue_length=5, is_watched=False)))
    asyncio.run(made.release("request 0"))
    assert lengths(made) == {"a": 4}


def test_requests_that_nobody_releases_are_discounted_when_they_must_have_ended() -> None:
    clock = Clock()
    made = table(Worker("a", ("m",), is_watched=False), clock=clock, answer_timeout_s=100, silence_s=10)
    chosen(made, 1)
    clock.now += 60
    asyncio.run(made.choose("m", "another"))
    clock.now += 50
    assert lengths(made) == {"a": 2}
    clock.now += 0.1
    assert lengths(made) == {"a": 1}
    # Too late to count again.
    asyncio.run(made.release("request 0"))
    assert lengths(made) == {"a": 1}
    asyncio.run(made.release("another"))
    assert lengths(made) == {"a": 0}


def test_the_lottery_draws_in_proportion_to_speed() -> None:
    draws = iter([number / 100 for number in range(100)])
    made = table(Worker("a", ("m",), 1), Worker("b", ("m",), 3), draws=draws, dispatch="lottery")
    assert Counter(chosen(made, 100)) == {"a": 25, "b": 75}


@pytest.mark.parametrize("dispatch", ["lottery", "shortest_queue"])
def test_no_worker_is_chosen_without_the_model_or_without_speed(dispatch: str) -> None:
    made = table(Worker("a", ("other",)), Worker("b", ("m",), 0), Worker("c", ("m",), 5e-5), dispatch=dispatch)
    assert chosen(made, 1) == [None]
    assert chosen(made, 1, "nothing") == [None]


def test_a_watched_worker_is_forgotten_without_heartbeats() -> None:
    clock = Clock()
    made = table(Worker("a", ("m",)), Worker("b", ("m",)), Worker("c", ("m",), is_watched=False), clock=clock)
    clock.now += 30
    assert names(made) == ["a", "b", "c"]
    assert asyncio.run(made.heart_beat("b", 0))
    clock.now += 0.1
    assert names(made) == ["b", "c"]
    # The worker is told so, and has to register again.
    assert not asyncio.run(made.heart_beat("a", 0))
    assert asyncio.run(made.register(Worker("a", ("m",))))
    assert sorted(names(made)) == ["a", "b", "c"]


def test_a_failed_worker_is_not_chosen_until_it_registers_again() -> None:
    made = table(Worker("a", ("m",)), Worker("b", ("m",), queue_length=5))
    asyncio.run(made.fail("a"))
    asyncio.run(made.fail("never"))
    assert chosen(made, 1) == ["b"]
    assert names(made) == ["b"]
    assert {worker.name for worker in asyncio.run(made.known())} == {"a", "b"}
    assert not asyncio.run(made.heart_beat("a", 0))
    assert asyncio.run(made.register(Worker("a", ("m",))))
    assert chosen(made, 1) == ["a"]


def test_registering_again_replaces_and_the_number_of_workers_is_bounded() -> None:
    made = table(Worker("a", ("m",)), Worker("b", ("m",)), max_workers=2)
    assert asyncio.run(made.register(Worker("a", ("new",))))
    assert not asyncio.run(made.register(Worker("c", ("m",))))
    asyncio.run(made.remove("b"))
    assert asyncio.run(made.register(Worker("c", ("m",))))
    assert {worker.name: worker.models for worker in asyncio.run(made.workers())} == {"a": ("new",), "c": ("m",)}


def test_the_number_of_workers_is_measured() -> None:
    recorder = FakeRecorder()
    made = WorkerTable(WorkerArgs(), recorder=recorder)
    for name in "abc":
        asyncio.run(made.register(Worker(name, ("m",))))
    asyncio.run(made.fail("b"))
    assert recorder.readings() == {(REGISTERED_WORKERS, ()): 2}
