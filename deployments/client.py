"""The smallest client that streams an answer, on the standard library alone: what the demo does and `curl` would do.

Knows OpenAI's wire format. Not a substitute for OpenAI's own client, which works as well.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

from llava_core.errors import LlavaError


class AnswerError(LlavaError):
    """The service answered with an error, or not at all."""


def chat_body(question: str, image: bytes, media_type: str, **options: Any) -> dict[str, Any]:
    """A request about one picture."""
    url = f"data:{media_type};base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], **options}


def stream_chat(
    base_url: str, body: dict[str, Any], *, key: str | None = None, timeout_s: float = 120.0
) -> Iterator[dict[str, Any]]:
    """The chunks of an answer as they arrive. Raises AnswerError for whatever is not an answer."""
    content = json.dumps({**body, "stream": True})
    headers = {"content-type": "application/json"}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    with _asking(base_url, "POST", "/v1/chat/completions", content, headers, timeout_s=timeout_s) as response:
        if response.status != http.HTTPStatus.OK:
            raise AnswerError(f"the service answered {response.status}: {response.read().decode(errors='replace')}")
        yield from _events(response)


def is_healthy(base_url: str, *, timeout_s: float = 10.0) -> bool:
    """Whether every stage can serve; False where nobody answers, too."""
    try:
        with _asking(base_url, "GET", "/health", None, {}, timeout_s=timeout_s) as response:
            return response.status == http.HTTPStatus.OK
    except AnswerError:
        return False


@contextlib.contextmanager
def _asking(
    base_url: str, method: str, path: str, content: str | None, headers: dict[str, str], *, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    """Directly, whatever proxy the environment names: it could not reach this machine's own addresses."""
    address = urllib.parse.urlsplit(base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout_s)
    try:
        connection.request(method, address.path.rstrip("/") + path, content, headers)
        with connection.getresponse() as response:
            yield response
    except (OSError, http.client.HTTPException) as error:
        raise AnswerError(f"the connection to {base_url} failed: {error}") from error
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event = _parse(line.removeprefix(b"data: "))
        if "error" in event:
            raise AnswerError(_message(event["error"]))
        yield event
    raise AnswerError("the stream ended before the answer did")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise AnswerError(f"the service sent something that is no event: {line[:100].decode(errors='replace')!r}")
    return event


def _message(error: object) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
