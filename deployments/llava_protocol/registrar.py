"""Workers of others on behalf of one gateway: who may register, what they have, and requests sent on to them.

A worker that fails is visible in the log and in metrics, and gets nothing more until it registers again. The table
being away costs its workers alone. Knows no HTTP of clients.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Collection, Sequence
from contextlib import aclosing

from deployments.errors import StageLostError, StageUnavailableError, WorkerFailedError
from deployments.llava_protocol.frames import Frame
from deployments.llava_protocol.table import Worker, Workers
from deployments.llava_protocol.worker_client import WorkerClient, WorkerStatus, canonical
from deployments.metrics import TIME_TO_FIRST_TOKEN, WORKER_FAILURES, Recorder
from deployments.request_context import current_request
from llava_core.errors import UnknownNameError

logger = logging.getLogger(__name__)
_AWAY = (StageLostError, StageUnavailableError)
# A page asks at every visit.
_REFRESH_S = 1.0
# What metrics call all models of workers, whose names are the workers' own.
_MODEL_LABEL = "registered"


class Registrar:
    """`own_models` are the service's own, which no worker can take over."""

    def __init__(self, workers: Workers, client: WorkerClient, own_models: Collection[str], recorder: Recorder) -> None:
        self._workers = workers
        self._client = client
        self._own_models = own_models
        self._recorder = recorder
        self._refreshing = asyncio.Lock()
        self._refreshed_at = -float("inf")

    async def register(self, name: str, status: WorkerStatus | None, *, is_watched: bool) -> None:
        """One that is not there, or has nothing to offer, is not registered, which is no error of whoever asks.

        Raises RequestError, or PermissionDeniedError.
        """
        name = self._client.check(name)
        try:
            await self._add(name, status or await self._client.status(name), is_watched=is_watched)
        except WorkerFailedError as error:
            self._note(name, error)
        except _AWAY as error:
            logger.warning("%s cannot register now: %s", name, error)

    async def heart_beat(self, name: str, queue_length: int) -> bool:
        """Whether the worker is known; otherwise it has to register."""
        try:
            return not self._client.is_off and await self._workers.heart_beat(canonical(name), queue_length)
        except _AWAY as error:
            logger.warning("a heartbeat of a worker is lost: %s", error)
            return False

    async def workers(self) -> Sequence[Worker]:
        """Those that requests are sent to."""
        return await self._listed(is_well=True)

    async def refresh(self) -> None:
        """Ask every worker what it has; those that do not answer are forgotten. Not more often than once in a while,
        whoever asks."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed_at < _REFRESH_S:
                return
            await asyncio.gather(*map(self._ask, await self._listed(is_well=False)))
            self._refreshed_at = time.monotonic()

    async def generate(self, model: str, body: bytes) -> AsyncGenerator[Frame, None]:
        """The frames of a worker that has the model. Raises UnknownNameError, WorkerFailedError, or that the table is
        away. Closing it ends the request at the worker's."""
        name = await self._workers.choose(model)
        if name is None:
            raise UnknownNameError("model", model, self._own_models)
        has_begun = False
        try:
            async with aclosing(self._client.generate(name, body)) as frames:
                async for frame in frames:
                    if not has_begun:
                        has_begun = True
                        seconds = time.perf_counter() - current_request().started
                        self._recorder.observe(TIME_TO_FIRST_TOKEN, seconds, _MODEL_LABEL)
                    yield frame
        except WorkerFailedError as error:
            self._note(name, error)
            await _tell(self._workers.fail(name))
            raise
        finally:
            await _tell(self._workers.release(name))

    async def _listed(self, *, is_well: bool) -> Sequence[Worker]:
        if self._client.is_off:
            return ()
        try:
            return await (self._workers.workers() if is_well else self._workers.known())
        except _AWAY as error:
            logger.warning("the table of registered workers is away, and they with it: %s", error)
            return ()

    async def _ask(self, worker: Worker) -> None:
        try:
            status = await self._client.status(worker.name)
            await self._add(worker.name, status, is_watched=worker.is_watched)
        except WorkerFailedError as error:
            self._note(worker.name, error)
            await _tell(self._workers.remove(worker.name))
        except _AWAY as error:
            logger.warning("%s is not asked again: %s", worker.name, error)

    async def _add(self, name: str, status: WorkerStatus, *, is_watched: bool) -> None:
        models = tuple(model for model in status.names() if model not in self._own_models)
        if len(models) < len(status.model_names):
            logger.warning("%s names models of this service's own, or names that cannot be shown: left out", name)
        if models:
            await self._workers.register(Worker(name, models, status.speed, status.queue_length, is_watched))

    def _note(self, name: str, error: WorkerFailedError) -> None:
        logger.warning("the worker %s failed: %s", name, error)
        self._recorder.count(WORKER_FAILURES, error.kind)


async def _tell(telling: Awaitable[None]) -> None:
    """To the table, whose being away changes no answer."""
    try:
        await telling
    except _AWAY as error:
        logger.warning("the table of registered workers is away: %s", error)
