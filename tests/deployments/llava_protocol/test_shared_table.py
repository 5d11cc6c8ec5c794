"""The table as gateways call it: by its deployment's methods, and never waiting for it indefinitely."""

import asyncio
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.errors import StageUnavailableError
from deployments.llava_protocol import shared_table
from deployments.llava_protocol.shared_table import SharedTable
from deployments.llava_protocol.table import Worker, WorkerTable
from deployments.settings.llava_protocol import WorkerArgs
from tests.deployments.fakes import FakeHandle

NAMES = ("register", "heart_beat", "choose", "release", "fail", "remove", "workers", "known")


def test_every_method_calls_the_table() -> None:
    table = WorkerTable(WorkerArgs())
    handle = FakeHandle(**{name: getattr(table, name) for name in NAMES})
    shared: Any = SharedTable(handle)  # type: ignore[arg-type]
    worker = Worker("http://gpu1", ("m",), is_watched=False)

    async def run() -> list[Any]:
        return [
            await shared.register(worker),
            await shared.heart_beat(worker.name, 3),
            await shared.heart_beat("http://gpu2", 0),
            await shared.choose("m", "request"),
            await shared.choose("n", "another"),
            [each.queue_length for each in await shared.workers()],
            await shared.release("request"),
            [each.queue_length for each in await shared.workers()],
            await shared.fail(worker.name),
            len(await shared.workers()),
            len(await shared.known()),
            await shared.remove(worker.name),
            len(await shared.known()),
        ]

    assert asyncio.run(run()) == [True, True, False, worker.name, None, [4], None, [3], None, 0, 1, None, 0]


def test_an_unavailable_table_raises_our_error() -> None:
    async def unavailable(*_: Any) -> None:
        raise DeploymentUnavailableError("WorkerTable")

    shared = SharedTable(FakeHandle(workers=unavailable))  # type: ignore[arg-type]
    with pytest.raises(StageUnavailableError):
        asyncio.run(shared.workers())  # type: ignore[arg-type]


def test_a_silent_table_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_table, "_ANSWER_S", 0.01)

    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    shared = SharedTable(FakeHandle(choose=never))  # type: ignore[arg-type]
    with pytest.raises(StageUnavailableError, match="does not answer"):
        asyncio.run(shared.choose("m", "request"))
