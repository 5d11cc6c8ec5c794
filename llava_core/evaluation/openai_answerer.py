"""An Answerer for any OpenAI-compatible endpoint: greedy, with several requests in flight, through our own client.

Fails on the first error: an unanswered question must not count as a wrong answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from llava_core.client import Client, Options, Question, ServiceError
from llava_core.errors import LlavaError
from llava_core.evaluation.task import Answer, Sample

# Only OpenAI's own fields.
_OPTIONS = Options(temperature=0, max_tokens=256, timings=False)


@dataclass(frozen=True)
class OpenAIAnswerer:
    """`url` is the server's root, such as http://127.0.0.1:8000; `api_key` is for a server that requires one."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    timeout_s: float = 120.0
    transport: httpx.BaseTransport | None = field(default=None, repr=False)

    def answer(self, samples: Sequence[Sample]) -> Iterator[Answer]:
        """Yield answers in the order of the samples. Raises LlavaError with the server's message if one is refused."""
        questions = [Question(sample.question, (sample.image,), options=_OPTIONS) for sample in samples]
        with Client(
            self.url, api_key=self.api_key, timeout_s=self.timeout_s, transport=self.transport, model=self.model
        ) as client:
            for sample, result in zip(samples, client.batch(questions, concurrency=self.concurrency), strict=True):
                try:
                    yield Answer(sample, result.unwrap().text)
                except LlavaError as error:
                    raise LlavaError(f"{self.url} did not answer sample {sample.id}: {error}") from error


def served_model(url: str, api_key: str | None = None, *, transport: httpx.BaseTransport | None = None) -> str:
    """The first model that a server lists. Raises LlavaError when it does not answer or lists none."""
    try:
        with Client(url, api_key=api_key, timeout_s=30, transport=transport) as client:
            return client.models()[0]
    except (ServiceError, IndexError) as error:
        raise LlavaError(f"{url}/v1/models does not list a model: {error}") from error
