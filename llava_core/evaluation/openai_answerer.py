"""An Answerer behind any OpenAI-compatible endpoint: pictures as data URLs, greedy, several requests at a time.

Fails on the first error: an unanswered question must not count as a wrong one.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx

from llava_core.errors import LlavaError
from llava_core.evaluation.task import Answer, Sample


@dataclass(frozen=True)
class OpenAIAnswerer:
    """`url` is the server's root, such as http://127.0.0.1:8000; `api_key` is for one that asks for it."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout_s: float = 120.0

    def answer(self, samples: Sequence[Sample]) -> Iterator[Answer]:
        """Answers in the order of the samples. Raises LlavaError with the server's message when one is refused."""
        with (
            httpx.Client(timeout=self.timeout_s, headers=_headers(self.api_key)) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            yield from pool.map(lambda sample: self._ask(client, sample), samples)

    def _ask(self, client: httpx.Client, sample: Sample) -> Answer:
        kind = "jpeg" if sample.image.startswith(b"\xff\xd8") else "png"
        url = f"data:image/{kind};base64,{base64.b64encode(sample.image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 256,
        }
        try:
            reply = client.post(f"{self.url}/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            raise LlavaError(f"{self.url} did not answer: {error!r}") from error
        if reply.status_code != httpx.codes.OK:
            raise LlavaError(f"{self.url} refused sample {sample.id} with {reply.status_code}: {reply.text[:300]}")
        try:
            return Answer(sample, str(reply.json()["choices"][0]["message"]["content"]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise LlavaError(f"{self.url} answered what is not a chat completion: {reply.text[:300]}") from error


def served_model(url: str, api_key: str | None = None) -> str:
    """The first model that a server lists. Raises LlavaError when it does not answer or lists none."""
    try:
        with httpx.Client(timeout=30, headers=_headers(api_key)) as client:
            return str(client.get(f"{url}/v1/models").raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise LlavaError(f"{url}/v1/models does not list a model: {error!r}") from error


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}
