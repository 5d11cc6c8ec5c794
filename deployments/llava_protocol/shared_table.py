"""A gateway's handle to the table that all gateways of an application share: a deployment of one replica.

A gateway does not wait for an unreachable table. Knows nothing of the table's contents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.errors import StageUnavailableError
from deployments.graph.ray_errors import ray_errors_as_ours
from deployments.llava_protocol.table import Worker

# Serve itself would wait indefinitely for a replica.
_ANSWER_S = 2.0


class SharedTable:
    """Implements Workers, see table.py."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def register(self, worker: Worker) -> bool:
        """See Workers."""
        return bool(await self._ask("register", worker))

    async def heart_beat(self, name: str, queue_length: int) -> bool:
        """See Workers."""
        return bool(await self._ask("heart_beat", name, queue_length))

    async def choose(self, model: str, request: str) -> str | None:
        """See Workers."""
        chosen: str | None = await self._ask("choose", model, request)
        return chosen

    async def release(self, request: str) -> None:
        """See Workers."""
        await self._ask("release", request)

    async def fail(self, name: str) -> None:
        """See Workers."""
        await self._ask("fail", name)

    async def remove(self, name: str) -> None:
        """See Workers."""
        await self._ask("remove", name)

    async def workers(self) -> Sequence[Worker]:
        """See Workers."""
        workers: Sequence[Worker] = await self._ask("workers")
        return workers

    async def known(self) -> Sequence[Worker]:
        """See Workers."""
        known: Sequence[Worker] = await self._ask("known")
        return known

    async def _ask(self, method: str, *given: object) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_S):
                with ray_errors_as_ours("worker_table"):
                    return await self._handle.options(method_name=method).remote(*given)
        except TimeoutError:
            raise StageUnavailableError("the table of registered workers does not answer") from None
