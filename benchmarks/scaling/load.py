"""A load that rises and falls: a varying number of clients, each asking again as soon as it has its answer.

Nothing is retried, so every failure shows. Knows HTTP, and nothing of replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.exchange import exchange, post_json
from benchmarks.peers.load import Answer, noise_png, read_answer
from llava_core.client.messages import user_message
from llava_core.client.requests import chat_body

NUM_TOKENS = 128
_SIDE = 128


@dataclass(frozen=True)
class Period:
    """A period with a constant number of clients."""

    seconds: float
    clients: int


async def run_load(port: int, periods: Sequence[Period], now: Clients) -> list[Answer]:
    """Run all periods and return the answers of all clients once the last has arrived."""
    answers: list[Answer] = []
    numbers = iter(range(10**9))
    clients: list[tuple[asyncio.Task[None], asyncio.Event]] = []
    for period in periods:
        while len(clients) < period.clients:
            is_over = asyncio.Event()
            clients.append((asyncio.create_task(_client(port, numbers, answers, is_over)), is_over))
        leaving = [clients.pop() for _ in range(len(clients) - period.clients)]
        for _, is_over in leaving:
            is_over.set()
        now.number = period.clients
        await asyncio.gather(asyncio.sleep(period.seconds), *(task for task, _ in leaving))
    for _, is_over in clients:
        is_over.set()
    await asyncio.gather(*(task for task, _ in clients))
    return answers


@dataclass
class Clients:
    """The current number of clients, for a watcher."""

    number: int = 0


async def ask(port: int, question: str, picture: bytes | None, *, num_tokens: int = NUM_TOKENS) -> Answer:
    """Send one request with a streamed answer."""
    body = chat_body(
        [user_message(question, [] if picture is None else [picture])],
        max_tokens=num_tokens,
        temperature=0,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    began = time.perf_counter()
    return read_answer(began, await exchange(port, post_json(port, body)))


async def _client(port: int, numbers: Iterator[int], answers: list[Answer], is_over: asyncio.Event) -> None:
    while not is_over.is_set():
        number = next(numbers)
        # A new picture each time, which no cache has.
        answers.append(await ask(port, f"Question {number}: what is there?", noise_png(number, _SIDE)))
