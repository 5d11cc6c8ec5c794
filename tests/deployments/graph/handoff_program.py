"""Run by test_handoff.py in a separate process: the real pipeline and handoff on a real Ray, over stages that compute
nothing, with results that record the process in which they are unpacked. Prints its observations as JSON."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.errors import StageLostError
from deployments.launch.launcher import ENVIRONMENT
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TokenDelta

# The size of one picture's features of a 7B model.
NUM_BYTES = 576 * 1024 * 2
NUM_REQUESTS = 120
# A handful of the 256 results: Ray's own objects, and results that it is about to free.
MOST_LEFT = 12 * NUM_BYTES
DEADLINE_S = 30.0


class Payload:
    """A large result, or a small one that refers to a shared object."""

    def __init__(self, log: str, data: object) -> None:
        self.log = log
        self.data = data

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()}\n")


class First:
    def __init__(self, log: str) -> None:
        self._log = log

    async def prepare(self, _request: GenerationRequest, _model: str) -> Payload:
        return Payload(self._log, zeros())


class Second:
    """Every request is about the same picture."""

    def __init__(self, log: str, handoff: Any) -> None:
        self._log, self._handoff = log, handoff
        self._features = handoff.share(zeros())

    async def encode(self, given: object) -> Payload:
        assert (await self._handoff.take(given)).data.nbytes == NUM_BYTES
        return Payload(self._log, self._features)


class Last:
    def __init__(self, handoff: Any) -> None:
        self._handoff = handoff

    async def generate(self, given: object) -> AsyncGenerator[TokenDelta, None]:
        features = await self._handoff.shared((await self._handoff.take(given)).data)
        assert features.nbytes == NUM_BYTES
        yield TokenDelta("id", "a")
        yield TokenDelta("id", "b", finish_reason="stop")


class Entrance:
    def __init__(self, *stages: Any) -> None:
        from deployments.graph.pipeline import Pipeline

        self._pipeline = Pipeline(*stages, model="m")

    async def ask(self) -> int:
        request = GenerationRequest("id", (Message("user", (ImagePart(b"x"),)),), SamplingParams())
        assert [item.text async for item in self._pipeline.stream(request) if isinstance(item, TokenDelta)] == [
            "a",
            "b",
        ]
        return os.getpid()


class Sharer:
    def share(self, handoff: Any) -> list[object]:
        return [handoff.share(zeros())]


class Maker:
    def __init__(self) -> None:
        self._may_make = asyncio.Event()

    async def make(self) -> npt.NDArray[np.uint8]:
        await self._may_make.wait()
        return zeros()

    async def release(self) -> None:
        self._may_make.set()


def zeros() -> npt.NDArray[np.uint8]:
    return np.zeros(NUM_BYTES, np.uint8)


def store_stats() -> Any:
    """Return Ray's statistics of its object store."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return get_memory_info_reply(state).store_stats


def main(log: str) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    from deployments.graph.handoff import RayHandoff, Reference

    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=256 * 1024**2)

    serve.start(proxy_location="Disabled")

    def deploy(cls: type, *args: Any) -> Any:
        decorate = serve.deployment(name=cls.__name__, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=16)
        return decorate(cls).bind(*args)

    handoff = RayHandoff()
    stages = deploy(First, log), deploy(Second, log, handoff), deploy(Last, handoff)
    handle: Any = serve.run(deploy(Entrance, *stages, handoff), route_prefix=None)

    async def ask(num_requests: int) -> set[int]:
        return {
            pid
            for _ in range(num_requests // 4)
            for pid in await asyncio.gather(*(handle.ask.remote() for _ in range(4)))
        }

    async def loss_of_a_dead_owners_object() -> str:
        sharer: Any = ray.remote(num_cpus=0)(Sharer).remote()
        [given] = await sharer.share.remote(handoff)
        ray.kill(sharer)
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            try:
                # The object may be found on this node until its owner is known to be dead.
                await handoff.shared(given)
            except StageLostError as error:
                return type(error).__name__
            await asyncio.sleep(0.1)
        return "nothing"

    async def is_made() -> list[bool]:
        """Return whether the object exists, before and after it is made."""
        maker: Any = ray.remote(num_cpus=0)(Maker).remote()
        given = Reference(maker.make.remote())
        seen = [handoff.is_made(given)]
        await maker.release.remote()
        result: Any = await handoff.take(given)
        assert result.nbytes == NUM_BYTES
        return [*seen, handoff.is_made(given)]

    async def run() -> dict[str, Any]:
        try:
            [gateway] = await ask(8)
            before = store_stats().cumulative_created_bytes
            await ask(NUM_REQUESTS)
            created = store_stats().cumulative_created_bytes - before
            deadline = time.monotonic() + DEADLINE_S
            # Ray frees unreferenced objects with a short delay.
            while (left := store_stats().object_store_bytes_used) > MOST_LEFT and time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            seen = {"left": left, "most_left": MOST_LEFT, "gateway": gateway, "created": created}
            return {**seen, "lost": await loss_of_a_dead_owners_object(), "made": await is_made()}
        finally:
            # Shut down while the loop that the handle has used still runs.
            await serve.shutdown_async()

    try:
        seen = asyncio.run(run())
    finally:
        # Even after a failure: otherwise Ray's processes would keep the caller's pipe open.
        ray.shutdown()
    seen["unpacked_by"] = [int(line) for line in Path(log).read_text().split()]
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
