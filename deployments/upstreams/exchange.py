"""HTTP with a server that answers for a model: bounds answers in bytes and time, and turns failures into errors of ours
that name the model but never an address or a key.

No client header is sent to the server, and none of the server's comes back; no proxies, cookies or redirects are used.
A request is retried only if it found no connection. The log has addresses and causes, but nothing that the server
wrote, because that may quote a prompt. Knows bytes and statuses, but not what answers contain.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from http import HTTPStatus

import httpx

from deployments.errors import UpstreamError, UpstreamRefusedError, UpstreamTimeoutError
from deployments.http import sse
from deployments.http.request_ids import REQUEST_ID_HEADER, SOUND_ID
from deployments.outgoing.bounded import read_up_to
from deployments.settings.upstreams import UpstreamArgs
from deployments.upstreams.redaction import Redaction
from llava_core.client.errors import error_details
from llava_core.client.retries import read_retry_after
from llava_core.errors import LlavaError, OverloadedError

logger = logging.getLogger(__name__)
# More than any event, any answer in one piece, or any error worth reading has.
MAX_EVENT_BYTES, MAX_ANSWER_BYTES, _MAX_ERROR_BYTES = 4 * 1024 * 1024, 64 * 1024 * 1024, 64 * 1024
_MAX_MESSAGE, _LONGEST_RETRY_S = 1000, 3600
# uvicorn, which most such servers run on, closes connections idle for 5 s; no request must be sent at that moment.
_KEEPALIVE_S = 2.0
# Refusals that are the client's fault. Others are caused by this service or its configuration.
_THE_CLIENTS_FAULT = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.CONFLICT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
}
# The codes that a server may give for them: known to clients, and few, because errors are counted by code.
_CODES = frozenset(
    """
    content_policy_violation content_refused context_length_exceeded image_too_large invalid_image invalid_json
    invalid_prompt invalid_value missing_required_parameter string_above_max_length text_too_long too_many_images
    unsupported_parameter unsupported_value
    """.split()
)
_SOUND_ID = re.compile(SOUND_ID)
# A code, of the server's own or ours, as opposed to a sentence that may quote the request.
_SOUND_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SOUND_TYPE = re.compile(r"[a-z0-9.+-]{1,64}/[a-z0-9.+-]{1,64}")


class Exchange:
    """Connections to the server behind the model that is called `name` here. `key` is the key for the server."""

    def __init__(self, name: str, args: UpstreamArgs, *, key: str | None = None, tls: ssl.SSLContext) -> None:
        self.name = name
        self._args = args
        self._key = key
        self._redacted = Redaction(name, args, key)
        # A transport and not a client, which would follow redirects and keep one caller's cookies for another.
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls,
            trust_env=False,
            retries=1,
            # One more, for polling the server's state.
            limits=httpx.Limits(max_connections=args.max_requests + 1, keepalive_expiry=_KEEPALIVE_S),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._transport.aclose()

    @contextlib.asynccontextmanager
    async def post(self, path: str, content: bytes, request_id: str, *, until: float) -> AsyncIterator[httpx.Response]:
        """Yields a response with status 200, to be read in the block. Leaving early disconnects, which ends the work.

        `until`, a time of the event loop, is when the head must have come, and an error with its body. Raises
        UpstreamError, UpstreamRefusedError or OverloadedError.
        """
        headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
        if _SOUND_ID.fullmatch(request_id):
            headers[REQUEST_ID_HEADER] = request_id
        with self.errors_as_ours():
            async with asyncio.timeout_at(until):
                response = await self._send("POST", path, headers, content)
            try:
                if response.status_code != HTTPStatus.OK:
                    async with asyncio.timeout_at(until):
                        body = await read_up_to(response.aiter_raw(), _MAX_ERROR_BYTES)
                    raise self.refusal(response.status_code, body or b"", response.headers.get("retry-after"))
                if "content-encoding" in response.headers:
                    raise self.garbage("compressed data, which it was not asked for")
                yield response
            finally:
                await response.aclose()

    async def get(self, path: str, *, within_s: float, max_bytes: int) -> tuple[int, bytes | None]:
        """Status and body, which is None if it is too long. Raises httpx.TransportError or TimeoutError."""
        async with asyncio.timeout(within_s):
            response = await self._send("GET", path, {"accept": "application/json"})
            try:
                return response.status_code, await read_up_to(response.aiter_raw(), max_bytes)
            finally:
                await response.aclose()

    async def _send(self, method: str, path: str, headers: dict[str, str], content: bytes = b"") -> httpx.Response:
        """The head of the answer; the body is still to be read."""
        url = httpx.URL(self._args.url + path)
        own = {"host": url.netloc.decode("ascii"), "user-agent": "llava-serve", "accept-encoding": "identity"}
        if self._key is not None:
            own["authorization"] = f"Bearer {self._key}"
        # The callers limit the time of reading and writing as a whole: httpx would time each piece.
        timeout = httpx.Timeout(None, connect=self._args.connect_seconds)
        request = httpx.Request(
            method, url, headers={**own, **headers}, content=content, extensions={"timeout": timeout.as_dict()}
        )
        return await self._transport.handle_async_request(request)

    async def whole(self, response: httpx.Response, *, until: float) -> bytes:
        """The body. Raises UpstreamError if it is too long or has not arrived by the event loop's time `until`."""
        with self.errors_as_ours():
            async with asyncio.timeout_at(until):
                body = await read_up_to(response.aiter_raw(), MAX_ANSWER_BYTES)
        if body is None:
            raise self.garbage(f"more than {MAX_ANSWER_BYTES} bytes")
        return body

    async def events(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Yields the content of a stream's `data:` lines. Comments count as signs of life.

        Raises UpstreamError for a line without end, and for silence.
        """
        media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != sse.MEDIA_TYPE:
            found = media_type if _SOUND_TYPE.fullmatch(media_type) else "no media type"
            raise self.garbage(f"{found} where a stream of events was asked for")
        pieces, held = response.aiter_raw(), bytearray()
        while True:
            with self.errors_as_ours():
                async with asyncio.timeout(self._args.silence_seconds):
                    while b"\n" not in held:
                        piece = await anext(pieces, None)
                        if piece is None:
                            return
                        held += piece
                        if len(held) > MAX_EVENT_BYTES:
                            raise self.garbage("an event that has no end")
            *lines, rest = held.split(b"\n")
            held = bytearray(rest)
            for line in lines:
                if line.startswith(b"data:"):
                    yield bytes(line.removeprefix(b"data:").strip())

    @contextlib.contextmanager
    def errors_as_ours(self) -> Iterator[None]:
        """A context manager around a block that waits for the server."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise self._failed("cannot be reached", "upstream_unreachable", repr(error)) from error
        except httpx.TransportError as error:
            # Without its text, which may quote what the server sent.
            what, kind = "broke the connection before the answer was complete", type(error).__name__
            raise self._failed(what, "upstream_cut", kind) from error
        except TimeoutError as error:
            self._warn("is silent")
            raise UpstreamTimeoutError(f"the server behind model {self.name!r} has fallen silent") from error

    def cut(self) -> UpstreamError:
        """The error for an answer that ends too early without a broken connection."""
        return self._failed("ended the stream before the answer was complete", "upstream_cut")

    def garbage(self, what: str) -> UpstreamError:
        """The error for something that is not an answer."""
        return self._failed(f"answered with {what}", "upstream_invalid")

    def refusal(self, status: int, body: bytes | dict[str, object], retry_after: str | None = None) -> LlavaError:
        """The error for the client when the server refuses a request, from the status and the server's own words."""
        said = self._said(body)
        code = said["code"] or ""
        self._warn(f"answered {status}" + (f" with {code}" if _SOUND_CODE.fullmatch(code) else ""))
        after = read_retry_after(retry_after)
        wait_s = None if after is None else min(_LONGEST_RETRY_S, max(1, math.ceil(after)))
        who = f"the server behind model {self.name!r}"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return OverloadedError(
                f"{who} takes no more requests now; try again later", limit="upstream", retry_after_s=wait_s or 1
            )
        if status in _THE_CLIENTS_FAULT:
            code = code if code in _CODES else "upstream_refused"
            return UpstreamRefusedError(str(said["message"]), status=status, param=said["param"], code=code)
        if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.GATEWAY_TIMEOUT):
            return UpstreamTimeoutError(f"{who} has not answered in time")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return UpstreamError(f"{who} does not accept this service's key", code="upstream_key_refused")
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return UpstreamError(f"{who} knows no such model or path (status {status})", code="upstream_failed")
        return UpstreamError(f"{who} failed (status {status})", code="upstream_failed", retry_after_s=wait_s)

    def _said(self, body: bytes | dict[str, object]) -> dict[str, str | None]:
        """The server's message, param and code, without anything that clients must not see."""
        details = error_details(body) or {"message": "it gave no reason", "param": None, "code": None}
        said = {name: details[name] and self._redacted(details[name]) for name in ("message", "param", "code")}
        return {name: text and text[:_MAX_MESSAGE] for name, text in said.items()}

    def _failed(self, what: str, code: str, cause: str | None = None) -> UpstreamError:
        self._warn(f"{what} ({cause})" if cause else what)
        return UpstreamError(f"the server behind model {self.name!r} {what}", code=code)

    def _warn(self, what: str) -> None:
        logger.warning("model %s: its server at %s %s", self.name, self._args.url, what)
