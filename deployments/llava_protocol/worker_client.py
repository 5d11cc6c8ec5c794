"""HTTP client for external workers: their status, and their answers, frame by frame.

A worker is never trusted to end its answer, to send it in time or to keep to the protocol. Knows which hosts may be
contacted, and nothing of other workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import httpx
from pydantic import BaseModel, Field, ValidationError

from deployments.errors import PermissionDeniedError, WorkerFailedError
from deployments.llava_protocol.frames import Frame, FrameReader
from deployments.outgoing.addresses import parse_address
from deployments.outgoing.bounded import read_up_to
from deployments.outgoing.connections import NoAddressError, Outgoing, Resolve, resolve_host
from deployments.settings.llava_protocol import WorkerArgs
from llava_core.errors import ImageError, RequestError

# A service that receives this header does not forward the request: two services registered with each other would
# forward it in a circle.
FORWARDED_HEADER = "x-llava-forwarded"
_HEADERS = {
    "accept-encoding": "identity",
    "content-type": "application/json",
    "user-agent": "llava-serve",
    FORWARDED_HEADER: "1",
}
_MAX_STATUS_BYTES = 64 * 1024
_MOST_MODELS, _LONGEST_NAME = 64, 128


class WorkerStatus(BaseModel):
    """A worker's status, as it reports it."""

    model_names: list[str] = Field(min_length=1, max_length=_MOST_MODELS)
    speed: float = Field(ge=0, le=1e6, allow_inf_nan=False)
    queue_length: int = Field(ge=0, lt=2**31)

    def names(self) -> tuple[str, ...]:
        """Return the model names that can be shown."""
        return tuple(name for name in self.model_names if 0 < len(name) <= _LONGEST_NAME and name.isprintable())


class WorkerClient:
    """Sends requests to workers on allowed hosts."""

    def __init__(self, args: WorkerArgs, *, resolve: Resolve = resolve_host) -> None:
        self._args = args
        self._outgoing = Outgoing(args, resolve=resolve)

    @property
    def is_off(self) -> bool:
        """Whether no worker may register."""
        return self._outgoing.is_off

    def check(self, name: str) -> str:
        """Return the canonical name of a worker that may register. Raises RequestError, or PermissionDeniedError."""
        if self.is_off:
            raise PermissionDeniedError(
                "workers cannot register here; allow their hosts in llava_protocol.workers.allowed_hosts"
            )
        url = _base(name)
        if url is None:
            raise RequestError("worker_name must be an address such as http://host:port", param="worker_name")
        if not self._outgoing.allows(url):
            raise PermissionDeniedError(
                "workers with this host, port or scheme cannot register here; see llava_protocol.workers",
                param="worker_name",
            )
        return canonical(name)

    async def status(self, name: str) -> WorkerStatus:
        """Ask a worker for its current status. Raises WorkerFailedError."""
        seconds = self._args.status_timeout_s
        try:
            # A limit for the whole status, which may come in pieces.
            async with asyncio.timeout(seconds), self._asking(name, "/worker_get_status", b"", seconds) as pieces:
                content = await read_up_to(pieces, _MAX_STATUS_BYTES)
        except TimeoutError:
            raise WorkerFailedError("silent", f"its status did not arrive within {seconds:g} s") from None
        if content is None:
            raise WorkerFailedError("garbage", f"its status has more than {_MAX_STATUS_BYTES} bytes")
        try:
            return WorkerStatus.model_validate_json(content)
        except ValidationError:
            raise WorkerFailedError("garbage", "its status lacks valid model_names, speed or queue_length") from None

    async def generate(self, name: str, body: bytes) -> AsyncGenerator[Frame, None]:
        """Yield a worker's frames as they arrive. Raises WorkerFailedError. Closing it ends the worker's request."""
        reader, has_begun = FrameReader(), False
        async with self._asking(name, "/worker_generate_stream", body, self._args.silence_s) as pieces:
            async for piece in pieces:
                for frame in reader.feed(piece):
                    has_begun = True
                    yield frame
        reader.finish()
        if not has_begun:
            raise WorkerFailedError("cut_off", "the stream ends before its first frame")

    @asynccontextmanager
    async def _asking(self, name: str, path: str, body: bytes, silence_s: float) -> AsyncIterator[AsyncIterator[bytes]]:
        """Send a request and yield the pieces of the response body. Failures while they are read inside the block
        become WorkerFailedError."""
        clock = asyncio.get_running_loop()
        ends_at = clock.time() + self._args.answer_timeout_s
        response: httpx.Response | None = None
        try:
            async with asyncio.timeout(silence_s):
                response = await self._outgoing.send("POST", httpx.URL(name + path), _HEADERS, body)
            if response.status_code != httpx.codes.OK:
                raise WorkerFailedError("unreachable", f"it answers {response.status_code}")
            if "content-encoding" in response.headers:
                raise WorkerFailedError("garbage", "it compresses what it sends")
            yield _in_time(response.aiter_raw(), silence_s, ends_at)
        except TimeoutError:
            raise WorkerFailedError("silent", f"nothing came for {silence_s:g} s") from None
        except NoAddressError as error:
            raise WorkerFailedError("unreachable", str(error)) from None
        except httpx.HTTPError as error:
            kind = "unreachable" if response is None else "cut_off"
            raise WorkerFailedError(kind, type(error).__name__) from None
        finally:
            if response is not None:
                await response.aclose()


async def _in_time(pieces: AsyncIterator[bytes], silence_s: float, ends_at: float) -> AsyncIterator[bytes]:
    """Limit the wait for each piece and the time for all of them. There is no timeout around the whole loop, because
    the pieces may be read from several tasks."""
    clock = asyncio.get_running_loop()
    while True:
        if clock.time() >= ends_at:
            raise WorkerFailedError("too_long", "the answer does not end")
        async with asyncio.timeout(silence_s):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


def canonical(name: str) -> str:
    """Normalise a worker's address; a string that is not an address stays as it is."""
    url = _base(name)
    return name if url is None else f"{url.scheme}://{url.netloc.decode('ascii')}"


def _base(name: str) -> httpx.URL | None:
    """Parse a worker's address, to which paths can be added; None for anything else."""
    try:
        url = parse_address(name, param="worker_name")
    except ImageError:
        return None
    return url if url.path in ("", "/") and "?" not in name and "#" not in name else None
