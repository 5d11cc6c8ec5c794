"""One gateway's external workers: who may register, which models they have, and requests forwarded to them.

A worker that fails shows in the log and in metrics, and gets no more requests until it registers again. While the table
is unreachable, only the registered workers are missing. Knows nothing of the clients' HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Collection, Sequence
from contextlib import aclosing

from deployments.errors import StageLostError, StageUnavailableError, WorkerFailedError
from deployments.http.request_context import current_request
from deployments.llava_protocol.frames import Frame
from deployments.llava_protocol.table import Worker, Workers
from deployments.llava_protocol.worker_client import WorkerClient, WorkerStatus, canonical
from deployments.metrics import TIME_TO_FIRST_TOKEN, WORKER_FAILURES, Recorder
from llava_core.errors import UnknownNameError

logger = logging.getLogger(__name__)
_AWAY = (StageLostError, StageUnavailableError)
# A page asks for a refresh at every visit.
_REFRESH_S = 1.0
# One metrics label for all models of workers, because workers choose the names.
_MODEL_LABEL = "registered"


class Registrar:
    """Registers workers and forwards requests to them. `own_models` are the service's own, which no worker can take
    over."""

    def __init__(self, workers: Workers, client: WorkerClient, own_models: Collection[str], recorder: Recorder) -> None:
        self._workers = workers
        self._client = client
        self._own_models = own_models
        self._recorder = recorder
        self._refreshing = asyncio.Lock()
        self._refreshed_at = -float("inf")

    async def register(self, name: str, status: WorkerStatus | None, *, is_watched: bool) -> None:
        """Register a worker. One that is unreachable, or has no models to offer, is not registered; the caller gets no
        error for that.

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
        """Pass a heartbeat on. Returns whether the worker is known; otherwise it has to register."""
        try:
            return not self._client.is_off and await self._workers.heart_beat(canonical(name), queue_length)
        except _AWAY as error:
            logger.warning("a heartbeat of a worker is lost: %s", error)
            return False

    async def workers(self) -> Sequence[Worker]:
        """List the workers that requests are sent to."""
        return await self._listed(is_well=True)

    async def refresh(self) -> None:
        """Ask every worker which models it has, and forget those that do not answer; at most once per _REFRESH_S."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed_at < _REFRESH_S:
                return
            await asyncio.gather(*map(self._ask, await self._listed(is_well=False)))
            self._refreshed_at = time.monotonic()

    async def generate(self, model: str, body: bytes) -> AsyncGenerator[Frame, None]:
        """Yield the frames of a worker that has the model. Raises UnknownNameError, WorkerFailedError, or one of _AWAY
        for the table. Closing it ends the worker's request."""
        request = uuid.uuid4().hex
        name = await self._choose(model, request)
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
            await _tell(self._workers.release(request))

    async def _choose(self, model: str, request: str) -> str:
        """A worker for the request. If the table is too slow to answer, it may still count the request, but only for as
        long as an answer may take."""
        try:
            name = await self._workers.choose(model, request)
        except asyncio.CancelledError:
            # The client has hung up; the table may have chosen nevertheless.
            await _tell(self._workers.release(request))
            raise
        if name is None:
            raise UnknownNameError("model", model, self._own_models)
        return name

    async def _listed(self, *, is_well: bool) -> Sequence[Worker]:
        if self._client.is_off:
            return ()
        try:
            return await (self._workers.workers() if is_well else self._workers.known())
        except _AWAY as error:
            logger.warning("the table of registered workers is unreachable, so there are none: %s", error)
            return ()

    async def _ask(self, worker: Worker) -> None:
        try:
            status = await self._client.status(worker.name)
            await self._add(worker.name, status, is_watched=worker.is_watched)
        except WorkerFailedError as error:
            self._note(worker.name, error)
            await _tell(self._workers.remove(worker.name))
        except _AWAY as error:
            logger.warning("%s could not be refreshed: %s", worker.name, error)

    async def _add(self, name: str, status: WorkerStatus, *, is_watched: bool) -> None:
        models = tuple(model for model in status.names() if model not in self._own_models)
        if len(models) < len(status.model_names):
            logger.warning("%s lists models of this service, or names that cannot be shown: skipped", name)
        if models:
            await self._workers.register(Worker(name, models, status.speed, status.queue_length, is_watched))

    def _note(self, name: str, error: WorkerFailedError) -> None:
        logger.warning("the worker %s failed: %s", name, error)
        self._recorder.count(WORKER_FAILURES, error.kind)


async def _tell(telling: Awaitable[None]) -> None:
    """Notify the table. If it is unreachable, that is only logged: no answer depends on it."""
    try:
        await telling
    except _AWAY as error:
        logger.warning("the table of registered workers is unreachable: %s", error)
