"""A closed loop of streamed chat completions against one server, and what its clients saw.

Answers are parsed when the load has finished. Knows OpenAI's wire format, but no server.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from benchmarks.exchange import Piece, exchange, post_json, read_response
from llava_core.client.messages import user_message
from llava_core.client.requests import CHAT, chat_body

NUM_TOKENS = 64
Figures = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """One request: when it began, when text arrived, in how many chunks, and the server's token counts.

    Chunks read together share one time. `error` is empty on success.
    """

    began: float
    texts: tuple[float, ...] = ()
    chunks: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""


def noise_png(seed: object, side: int = 336) -> bytes:
    """Draw a picture that no cache has seen, and that does not compress."""
    grey = Image.frombytes("L", (side, side), random.Random(str(seed)).randbytes(side * side))
    buffer = io.BytesIO()
    grey.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def make_requests(seed: object, count: int, pictures: int) -> list[dict[str, object]]:
    """Make bodies with different questions, cycling through `pictures` different pictures."""
    drawn = [noise_png(f"{seed}:{index}") for index in range(min(count, pictures))]
    return [
        chat_body(
            [
                user_message(
                    f"Question {index:04}: what is in the picture, where is it, and what does import this return?",
                    [drawn[index % len(drawn)]],
                )
            ],
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for index in range(count)
    ]


def run_load(
    port: int, bodies: Sequence[dict[str, object]], clients: int, *, path: str = CHAT
) -> tuple[list[Answer], float]:
    """Send every body once, with `clients` concurrent clients; returns the answers in the bodies' order, and the total
    seconds."""
    messages = [post_json(port, body, path=path) for body in bodies]
    return asyncio.run(_ask_all(port, messages, clients))


def summarize(answers: Sequence[Answer], wall: float) -> Figures:
    """Return medians and percentiles in milliseconds. Failed answers are only counted."""
    good = [answer for answer in answers if not answer.error]
    if not good:
        raise SystemExit(f"no request was answered: {answers[0].error}")
    first = [answer.texts[0] - answer.began for answer in good]
    gaps = [after - before for answer in good for before, after in zip(answer.texts, answer.texts[1:], strict=False)]
    further = [(answer.texts[-1] - answer.texts[0]) / max(answer.tokens - 1, 1) for answer in good]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "wall_s": round(wall, 2),
        "first_ms_p50": percentile(first, 0.5),
        "first_ms_p99": percentile(first, 0.99),
        "gap_ms_p50": percentile(gaps, 0.5),
        "gap_ms_p99": percentile(gaps, 0.99),
        "token_ms_p50": percentile(further, 0.5),
        "tokens_per_s": round(sum(answer.tokens for answer in good) / wall, 1),
        "chunks_per_request": round(statistics.mean(answer.chunks for answer in good), 1),
        "arrivals_per_request": round(statistics.mean(len(answer.texts) for answer in good), 1),
        "tokens_per_request": round(statistics.mean(answer.tokens for answer in good), 1),
        "prompt_tokens": statistics.median(answer.prompt_tokens for answer in good),
    }


def percentile(seconds: Sequence[float], share: float) -> float:
    """Return the percentile in milliseconds by nearest rank, which is a measured value; 0 without values."""
    ordered = sorted(seconds)
    return round(ordered[math.ceil(share * len(ordered)) - 1] * 1e3, 2) if ordered else 0.0


def read_answer(began: float, pieces: Sequence[Piece]) -> Answer:
    """Parse the bytes of a whole response."""
    response = read_response(pieces)
    if response.status != 200:
        return Answer(began, error=f"status {response.status}: {response.body[:300].decode(errors='replace')}")
    texts: list[float] = []
    chunks = prompt_tokens = tokens = 0
    for when, content in response.events():
        if content == b"[DONE]":
            continue
        event = json.loads(content)
        if event.get("error"):
            return Answer(began, error=json.dumps(event)[:300])
        if event.get("usage"):
            prompt_tokens, tokens = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
        if any(choice["delta"].get("content") for choice in event.get("choices", ())):
            chunks += 1
            if when not in texts[-1:]:
                texts.append(when)
    error = "" if texts and tokens else "the stream ended without text, or without its usage"
    return Answer(began, tuple(texts), chunks, prompt_tokens, tokens, error)


async def _ask_all(port: int, messages: Sequence[bytes], clients: int) -> tuple[list[Answer], float]:
    heard: dict[int, tuple[float, list[Piece]]] = {}
    waiting = iter(enumerate(messages))

    async def client() -> None:
        for index, message in waiting:
            began = time.perf_counter()
            heard[index] = began, await exchange(port, message)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - begun
    return [read_answer(*heard[index]) for index in range(len(messages))], wall
