"""A gateway and external workers: what it accepts from them, and what it does when one fails or the table is
unreachable."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from deployments.errors import PermissionDeniedError, StageUnavailableError, WorkerFailedError
from deployments.llava_protocol.frames import Frame
from deployments.llava_protocol.registrar import Registrar
from deployments.llava_protocol.table import Worker, Workers, WorkerTable
from deployments.llava_protocol.worker_client import WorkerClient, WorkerStatus
from deployments.metrics import TIME_TO_FIRST_TOKEN, WORKER_FAILURES
from deployments.settings.llava_protocol import WorkerArgs
from llava_core.errors import UnknownNameError
from tests.deployments.fakes import FakeRecorder
from tests.deployments.llava_protocol.original_worker import OriginalWorker, original_worker

BODY = b'{"prompt": "USER: hi"}'
STATUS = WorkerStatus(model_names=["llava-other"], speed=1, queue_length=0)


class Setting:
    """A registrar that allows these workers, over a table that tests can inspect."""

    def __init__(self, *workers: OriginalWorker, table: Workers | None = None) -> None:
        hosts = [worker.url.removeprefix("http://") for worker in workers]
        args = WorkerArgs(allowed_hosts=tuple(hosts), allowed_networks=("127.0.0.0/8",), allow_http=True)
        self.recorder = FakeRecorder()
        self.table = table or WorkerTable(args)
        self.registrar = Registrar(self.table, WorkerClient(args), {"mine"}, self.recorder)

    def models(self) -> list[tuple[str, ...]]:
        return [worker.models for worker in asyncio.run(self.registrar.workers())]

    def failures(self, kind: str) -> float:
        return self.recorder.counted[WORKER_FAILURES, (kind,)]


async def _frames(setting: Setting, model: str = "llava-other") -> list[Frame]:
    return [frame async for frame in setting.registrar.generate(model, BODY)]


def test_a_workers_status_is_taken_as_sent_or_requested_if_missing() -> None:
    with original_worker() as worker:
        setting = Setting(worker)
        status = WorkerStatus(model_names=["told"], speed=2, queue_length=7)
        asyncio.run(setting.registrar.register(worker.url, status, is_watched=False))
        assert asyncio.run(setting.table.workers()) == [Worker(worker.url, ("told",), 2, 7, is_watched=False)]
        assert worker.num_status == 0
        asyncio.run(setting.registrar.register(worker.url, None, is_watched=True))
        assert asyncio.run(setting.table.workers()) == [Worker(worker.url, ("llava-other",))]
        assert worker.num_status == 1


def test_no_worker_can_take_over_a_model_of_this_service() -> None:
    with original_worker() as worker:
        setting = Setting(worker)
        both = WorkerStatus(model_names=["mine", "other"], speed=1, queue_length=0)
        asyncio.run(setting.registrar.register(worker.url, both, is_watched=True))
        assert setting.models() == [("other",)]
        asyncio.run(setting.table.remove(worker.url))
        only = WorkerStatus(model_names=["mine"], speed=1, queue_length=0)
        asyncio.run(setting.registrar.register(worker.url, only, is_watched=True))
        assert setting.models() == []


def test_a_worker_that_is_not_allowed_cannot_register() -> None:
    with original_worker() as worker, pytest.raises(PermissionDeniedError):
        asyncio.run(Setting().registrar.register(worker.url, STATUS, is_watched=True))
    assert worker.num_status == 0


def test_a_worker_that_does_not_answer_is_not_registered(caplog: pytest.LogCaptureFixture) -> None:
    with original_worker() as worker:
        setting = Setting(worker)
    asyncio.run(setting.registrar.register(worker.url, None, is_watched=True))
    assert setting.models() == []
    assert setting.failures("unreachable") == 1
    assert worker.url in caplog.text


def test_an_answer_is_forwarded_and_its_first_frame_measured() -> None:
    with original_worker() as worker:
        setting = Setting(worker)
        asyncio.run(setting.registrar.register(worker.url, STATUS, is_watched=False))
        assert [frame.text for frame in asyncio.run(_frames(setting))] == ["USER: hi Hel", "USER: hi Hello"]
        assert worker.asked == [{"prompt": "USER: hi"}]
    assert len(setting.recorder.observed[TIME_TO_FIRST_TOKEN, ("registered",)]) == 1
    [left] = asyncio.run(setting.table.workers())
    assert left.queue_length == 0


def test_a_model_without_a_worker_is_unknown() -> None:
    with pytest.raises(UnknownNameError, match="known are: mine"):
        asyncio.run(_frames(Setting(), "nothing"))


def test_a_failed_worker_gets_no_requests_until_it_registers_again() -> None:
    with original_worker(lambda _: [b"garbage\0"]) as worker:
        setting = Setting(worker)
        asyncio.run(setting.registrar.register(worker.url, STATUS, is_watched=True))
        with pytest.raises(WorkerFailedError):
            asyncio.run(_frames(setting))
        assert setting.failures("garbage") == 1
        assert setting.models() == []
        with pytest.raises(UnknownNameError):
            asyncio.run(_frames(setting))
        assert len(worker.asked) == 1
        # The response to its next heartbeat tells it to register.
        assert not asyncio.run(setting.registrar.heart_beat(worker.url, 0))
        asyncio.run(setting.registrar.register(worker.url, STATUS, is_watched=True))
        assert setting.models() == [("llava-other",)]


def test_heartbeats_are_matched_by_any_spelling_of_the_address() -> None:
    with original_worker() as worker:
        setting = Setting(worker)
        asyncio.run(setting.registrar.register(worker.url, STATUS, is_watched=True))
        assert asyncio.run(setting.registrar.heart_beat(f"{worker.url}/", 4))
        [found] = asyncio.run(setting.table.workers())
        assert found.queue_length == 4
        assert not asyncio.run(setting.registrar.heart_beat("no address", 0))


def test_refreshing_queries_all_workers_and_forgets_silent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with original_worker() as well, original_worker() as failed:
        with original_worker() as gone:
            setting = Setting(well, failed, gone)
            for worker in (well, failed, gone):
                asyncio.run(setting.registrar.register(worker.url, STATUS, is_watched=True))
        asyncio.run(setting.table.fail(failed.url))
        well.status["model_names"] = ["new"]

        async def twice() -> None:
            await asyncio.gather(setting.registrar.refresh(), setting.registrar.refresh())

        asyncio.run(twice())
        assert setting.models() == [("new",), ("llava-other",)]
        assert [worker.num_status for worker in (well, failed)] == [1, 1]
    assert [worker.name for worker in asyncio.run(setting.table.known())] == [well.url, failed.url]


class Away(WorkerTable):
    """An unreachable table."""

    async def _away(self, *_: Any) -> Any:
        raise StageUnavailableError("away")

    register = heart_beat = choose = workers = known = fail = release = remove = _away  # type: ignore[assignment]


def test_without_its_table_a_gateway_has_no_workers_and_logs_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with original_worker() as worker:
        setting = Setting(worker, table=Away(WorkerArgs()))
        with caplog.at_level(logging.WARNING):
            asyncio.run(setting.registrar.register(worker.url, None, is_watched=True))
            assert not asyncio.run(setting.registrar.heart_beat(worker.url, 0))
            assert setting.models() == []
            asyncio.run(setting.registrar.refresh())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 4
    with pytest.raises(StageUnavailableError):
        asyncio.run(_frames(setting))


def test_an_answer_survives_a_failing_table_update() -> None:
    class Forgetful(WorkerTable):
        async def release(self, request: str) -> None:
            raise StageUnavailableError("away")

    with original_worker() as worker:
        setting = Setting(worker, table=Forgetful(WorkerArgs()))
        asyncio.run(setting.registrar.register(worker.url, STATUS, is_watched=True))
        assert len(asyncio.run(_frames(setting))) == 2


@pytest.mark.parametrize("has_chosen", [False, True])
def test_a_client_that_hangs_up_during_the_choice_leaves_no_request_behind(*, has_chosen: bool) -> None:
    is_asked = asyncio.Event()

    class Slow(WorkerTable):
        """Its answer to a choice never arrives."""

        async def choose(self, model: str, request: str) -> str | None:
            if has_chosen:
                await super().choose(model, request)
                assert [worker.queue_length for worker in await self.workers()] == [1]
            is_asked.set()
            await asyncio.Event().wait()
            return None

    async def hang_up(setting: Setting) -> None:
        await setting.table.register(Worker("http://gpu1", ("llava-other",), is_watched=False))
        asking = asyncio.create_task(_frames(setting))
        await is_asked.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert [worker.queue_length for worker in await setting.table.workers()] == [0]

    asyncio.run(hang_up(Setting(table=Slow(WorkerArgs()))))


def test_the_table_is_not_queried_where_no_worker_may_register() -> None:
    class Asked(WorkerTable):
        async def workers(self) -> Sequence[Worker]:
            raise AssertionError("where nobody may register there is nothing to ask")

    assert Setting(table=Asked(WorkerArgs())).models() == []
