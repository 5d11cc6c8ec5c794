"""The engine in a separate process, given the same requests as the service: the baseline of share.py.

It is loaded as in a replica: with its precision, its memory pages, and a thread on every core, which a replica has only
for models of more than 50 M parameters. Prompts are tokenized and pictures encoded before the clock starts. Knows no
HTTP and no Ray.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

from benchmarks.peers.load import Answer
from deployments.openai_api.chat_request import read_chat_request
from deployments.settings.models import ModelArgs
from llava_core.engine.async_engine import AsyncEngine
from llava_core.inference import LocalModel
from llava_core.stages.loading import TORCH_ENVIRONMENT, in_thread_of_its_own, set_up_compute
from llava_core.types import EngineRequest
from llava_core.vision.encode import encode_images

Bodies = Sequence[dict[str, object]]


class EngineAlone:
    """The engine with one checkpoint; close it after the last request."""

    def __init__(self, folder: Path) -> None:
        # As in a replica: torch reads it when the new process imports torch.
        for name, value in TORCH_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._folder = folder
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def ask(self, bodies: Bodies, clients: int) -> tuple[list[Answer], float]:
        """Run a load like `run_load` on the service."""
        return self._process.submit(_ask, self._folder, list(bodies), clients).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


@cache
def _load(folder: Path) -> LocalModel:
    model = ModelArgs(checkpoint=str(folder))

    def load() -> LocalModel:
        return LocalModel(
            folder, options=set_up_compute(model.generator.compute, num_gpus=0), engine=model.engine.config
        )

    return in_thread_of_its_own(load)


def _ask(folder: Path, bodies: Bodies, clients: int) -> tuple[list[Answer], float]:
    model = _load(folder)
    return asyncio.run(_ask_all(model, in_thread_of_its_own(lambda: _prepare(model, bodies)), clients))


def _prepare(model: LocalModel, bodies: Bodies) -> list[EngineRequest]:
    """Prepare requests like the gateway, the preprocessor and the encoder, with the caches that these have."""
    requests = []
    for index, body in enumerate(bodies):
        asked = read_chat_request(json.dumps(body).encode(), f"{index}", model.preparer.limits).generation
        prepared = model.preparer.prepare(asked)
        features = encode_images(model.tower, prepared.images, model.feature_cache)
        requests.append(EngineRequest(prepared.request_id, prepared.prompt_ids, features, prepared.sampling))
    return requests


async def _ask_all(model: LocalModel, requests: Sequence[EngineRequest], clients: int) -> tuple[list[Answer], float]:
    engine = AsyncEngine(model.engine)
    answers: dict[str, Answer] = {}
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            answers[request.request_id] = await _ask_one(engine, request)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - begun
    engine.close()
    return [answers[request.request_id] for request in requests], wall


async def _ask_one(engine: AsyncEngine, request: EngineRequest) -> Answer:
    began, texts, usage = time.perf_counter(), [], None
    async for delta in engine.generate(request):
        usage = delta.usage
        if delta.text:
            texts.append(time.perf_counter())
    assert usage is not None, "an engine's last delta carries its usage"
    return Answer(began, tuple(texts), len(texts), usage.prompt_tokens, usage.completion_tokens)
