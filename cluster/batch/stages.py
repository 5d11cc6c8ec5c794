"""The three stages as processes of a Ray Data pipeline: blocks of records in, the same records one stage further out.

Each loads its own part of the checkpoint and does what the service's stage of the same name does. Failed rows pass
through. Depends on Ray only for the assignment of GPUs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.batch.records import (
    INPUT_ERROR,
    UNREADABLE,
    Answer,
    Block,
    EngineReading,
    Failure,
    Record,
    failure,
    from_block,
    to_block,
)
from cluster.batch.settings import JobSettings, StageName
from llava_core.engine.config import EngineConfig
from llava_core.errors import EngineError, LlavaError, RequestError
from llava_core.lru import LruCache
from llava_core.questions import Question, prepare_question
from llava_core.stages.loading import Compute, in_thread_of_its_own, load_encoder, load_engine
from llava_core.types import EngineRequest, ImageFeatures, PreparedRequest

if TYPE_CHECKING:
    from llava_core.engine.async_engine import AsyncEngine
    from llava_core.engine.engine import Engine
    from llava_core.stages.shared_cores import Cores

logger = logging.getLogger(__name__)
# Questions about the same picture are mostly adjacent.
_FEATURE_CACHE_BYTES = 64 * 1024 * 1024
# Nobody reads an answer before its end.
_DELTA_GAP_S = 0.2


class Prepare:
    """Reads, decodes and tiles pictures and tokenizes prompts; several threads may call it."""

    def __init__(self, job: JobSettings) -> None:
        from llava_core.checkpoints.describe import load_preparer

        self._preparer = load_preparer(job.model.checkpoint.open(), template=job.model.template)
        self._sampling, self._view = job.sampling, job.view
        # The last file that was read. Once it can no longer be read, the storage of the pictures has gone away.
        self._was_read: Path | None = None

    def __call__(self, block: Block) -> Block:
        """Turn questions into prepared requests."""
        return to_block(map(self._prepare, from_block(block)))

    def _prepare(self, record: Record) -> Record:
        if not isinstance(record.value, Question):
            return record
        began = time.perf_counter()
        prepared: PreparedRequest | Failure
        try:
            prepared = prepare_question(self._preparer, record.value, self._sampling, str(record.row), view=self._view)
        except RequestError as error:
            if error.code == UNREADABLE:
                return record.became(self._unreadable(str(error)))
            prepared = failure(error)
        self._was_read = next((image for image in record.value.images if isinstance(image, Path)), self._was_read)
        return record.became(prepared, preprocess=_ms_since(began))

    def _unreadable(self, message: str) -> Failure:
        """Blame the row where another picture can still be read, and the input where an earlier one no longer can."""
        known = self._was_read
        if known is None:
            return Failure(UNREADABLE, message, is_certain=False)
        try:
            with known.open("rb") as file:
                file.read(1)
        except OSError as error:
            return Failure(
                INPUT_ERROR,
                f"{message}; nor can {known}, which was read before: {error.strerror} on "
                f"{os.uname().nodename}. Once the pictures are back, the same command resumes",
            )
        return Failure(UNREADABLE, message)


class Encode:
    """Runs the tower; one thread calls it."""

    def __init__(self, job: JobSettings) -> None:
        stage, compute = job.stages["encode"], compute_of("encode", job)
        self._tower, self._cores = in_thread_of_its_own(
            lambda: load_encoder(job.model.checkpoint.open(), compute, num_gpus=stage.num_gpus)
        )
        self._cache: LruCache[ImageFeatures] = LruCache(_FEATURE_CACHE_BYTES)

    def __call__(self, block: Block) -> Block:
        """Turn prepared requests into engine requests."""
        try:
            return to_block(map(self._encode, from_block(block)))
        finally:
            self._cores.release()

    def _encode(self, record: Record) -> Record:
        from llava_core.vision.encode import encode_images

        request = record.value
        if not isinstance(request, PreparedRequest):
            return record
        began = time.perf_counter()
        try:
            features = encode_images(self._tower, request.images, self._cache)
        except (RuntimeError, ValueError) as error:
            logger.exception("row %d could not be encoded", record.row)
            return record.became(failure(EngineError(f"the pictures could not be encoded: {error}")))
        encoded = EngineRequest(request.request_id, request.prompt_ids, features, request.sampling)
        return record.became(encoded, encode=_ms_since(began))


class Generate:
    """Runs the engine on its own thread; one calling thread for each block in flight."""

    def __init__(self, job: JobSettings, max_rows: int) -> None:
        """Concurrent calls bring at most `max_rows` rows in all."""
        stage, compute = job.stages["generate"], compute_of("generate", job)
        config = EngineConfig(max_running=job.max_running, max_waiting=max_rows)
        self._engine, _, cores = in_thread_of_its_own(
            lambda: load_engine(job.model.checkpoint.open(), compute, config, num_gpus=stage.num_gpus)
        )
        self._replica = secrets.token_hex(4)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="answers", daemon=True).start()
        self._running = asyncio.run_coroutine_threadsafe(_start(self._engine, cores), self._loop).result()

    def __call__(self, block: Block) -> Block:
        """Turn engine requests into answers, while answers of other blocks are generated concurrently."""
        records = list(from_block(block))
        done = asyncio.run_coroutine_threadsafe(self._answer_all(records), self._loop).result()
        return to_block([*done[:-1], *(_with(record, self._reading()) for record in done[-1:])])

    async def _answer_all(self, records: Iterable[Record]) -> list[Record]:
        return await asyncio.gather(*map(self._answer, records))

    async def _answer(self, record: Record) -> Record:
        request = record.value
        if not isinstance(request, EngineRequest):
            return record
        text, tokens = "", list[int]()
        try:
            async for delta in self._running.generate(request):
                text += delta.text
                tokens += delta.token_ids
        except LlavaError as error:
            self._exit_without_engine()
            return record.became(failure(error))
        assert delta.finish_reason is not None, request.request_id
        assert delta.usage is not None, request.request_id
        return record.became(Answer(text, tuple(tokens), delta.finish_reason, delta.usage), **delta.stage_ms)

    def _exit_without_engine(self) -> None:
        """Exit if the engine has died, since every further row would fail: Ray starts another process in its place."""
        try:
            self._running.check_health()
        except EngineError:
            logger.exception("this process ends")
            os._exit(1)

    def _reading(self) -> EngineReading:
        stats = self._engine.stats
        return EngineReading(
            self._replica, stats.num_steps, stats.scheduled_requests, stats.step_seconds, stats.output_tokens
        )


async def _start(engine: Engine, cores: Cores) -> AsyncEngine:
    from llava_core.engine.async_engine import AsyncEngine

    return AsyncEngine(engine, delta_gap_s=_DELTA_GAP_S, before_step=cores.claim, when_idle=cores.release)


def compute_of(name: StageName, job: JobSettings) -> Compute:
    """Return where and how a stage computes; only the decoder is quantized."""
    stage, model = job.stages[name], job.model
    quantization = model.quantization if name == "generate" else None
    return Compute("auto", model.dtype, stage.threads, quantization)


def _ms_since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def _with(record: Record, reading: EngineReading) -> Record:
    return replace(record, reading=reading)
