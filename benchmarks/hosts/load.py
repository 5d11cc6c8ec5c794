"""Clients that send requests without pause and record each outcome; a program for a separate host.

    python -m benchmarks.hosts.load --out FILE [--clients 4] ADDRESS [ADDRESS ...]

As behind a load balancer, a client that cannot connect to one address tries the next; nothing else is retried. Ends on
SIGTERM, and also records requests that are unfinished by then. Knows OpenAI's wire format, but not what is done to the
service meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import io
import itertools
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx
from PIL import Image

from llava_core.client.messages import user_message
from llava_core.client.requests import CHAT, chat_body

_PICTURE = Path(__file__).parents[2] / "examples" / "scene.png"
# Each client has its own picture, so that all replicas are busy. Equal questions about equal pictures have equal
# answers.
QUESTIONS = ("Describe the picture.", "How many shapes are there?", "What does the text say?", "What is in the middle?")
# The service sends a heartbeat every 15 s: a client that hears nothing for much longer has lost it.
_CONNECT_S, _SILENCE_S, _PAUSE_S = 1.0, 35.0, 0.2
# How long an unreachable address is avoided, as by a load balancer.
_AVOIDED_S = 10.0


@dataclass
class Asked:
    """One request, timed by the clock that all processes of a machine share. `error` is "" for a complete answer.

    `gap_s` is the longest silence once the answer had begun; `gap_ended` is when it ended."""

    client: int
    question: str
    began: float
    address: str = ""
    ended: float = 0.0
    error: str = ""
    text: str = ""
    first_s: float = 0.0
    gap_s: float = 0.0
    gap_ended: float = 0.0
    _heard: float = 0.0

    @property
    def has_failed(self) -> bool:
        """Whether it ended without its answer, and not only because the load ended."""
        return self.error not in ("", "unfinished")

    def hear(self, text: str) -> None:
        """Record a piece of the answer."""
        now = time.monotonic()
        if not self.text:
            self.first_s = now - self.began
        self._note_silence(now)
        self.text += text

    def end(self, error: str) -> None:
        """Record the end of the request."""
        self.ended, self.error = time.monotonic(), error
        self._note_silence(self.ended)

    def _note_silence(self, now: float) -> None:
        if self.text and now - self._heard > self.gap_s:
            self.gap_s, self.gap_ended = now - self._heard, now
        self._heard = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("addresses", nargs="+", metavar="ADDRESS", help="host and port")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each request")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    options = parser.parse_args()
    with options.out.open("a", buffering=1) as out:
        asyncio.run(Load(options.addresses, options.tokens, out).run(options.clients))


class Load:
    """Sends requests to the addresses, and writes the outcomes to `out`."""

    def __init__(self, addresses: Sequence[str], num_tokens: int, out: IO[str]) -> None:
        self._addresses = addresses
        self._num_tokens = num_tokens
        self._out = out
        # Until when each address is avoided.
        self._avoided: dict[str, float] = {}

    async def run(self, num_clients: int) -> None:
        """Run the clients until SIGTERM."""
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as http:
            clients = [asyncio.create_task(self._ask_on(http, number)) for number in range(num_clients)]
            await asyncio.wait([asyncio.create_task(told.wait()), *clients], return_when=asyncio.FIRST_COMPLETED)
            failed = [client for client in clients if client.done()]
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
            for client in failed:
                client.result()

    async def _ask_on(self, http: httpx.AsyncClient, number: int) -> None:
        for count in itertools.count(number):
            asked = Asked(number, QUESTIONS[count % len(QUESTIONS)], began=time.monotonic())
            error = "unfinished"
            try:
                error = await self._ask(http, asked, first=count % len(self._addresses))
            finally:
                asked.end(error)
                self._out.write(json.dumps(asdict(asked)) + "\n")
            if error:
                await asyncio.sleep(_PAUSE_S)

    async def _ask(self, http: httpx.AsyncClient, asked: Asked, *, first: int) -> str:
        """Send a request and return its error, "" if there is none."""
        addresses = [*self._addresses[first:], *self._addresses[:first]]
        for address in sorted(addresses, key=lambda each: self._avoided.get(each, 0.0) > asked.began):
            asked.address = address
            try:
                return await self._read(http, asked)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                self._avoided[asked.address] = time.monotonic() + _AVOIDED_S
            except httpx.ReadTimeout:
                return "silence"
            except httpx.TransportError:
                return "connection lost"
        return "no connection"

    async def _read(self, http: httpx.AsyncClient, asked: Asked) -> str:
        body = request_body(asked.client, asked.question, self._num_tokens)
        async with http.stream("POST", f"http://{asked.address}{CHAT}", json=body) as response:
            if response.status_code != httpx.codes.OK:
                return await _refusal(response)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return ""
                event: dict[str, Any] = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if "error" in event:
                    return f"stream: {event['error']['code']}"
                for choice in event.get("choices", ()):
                    asked.hear(choice["delta"].get("content") or "")
        return "cut short"


async def _refusal(response: httpx.Response) -> str:
    """Describe a refusal: a gateway's body names the error, while HAProxy without a gateway sends a page of its own."""
    is_a_gateways = b'"error"' in await response.aread()
    return f"status {response.status_code}" + ("" if is_a_gateways else " of HAProxy")


def request_body(client: int, question: str, num_tokens: int) -> dict[str, object]:
    """Ask for a greedy answer of exactly `num_tokens` tokens about the client's picture."""
    message = user_message(question, [_picture(client)])
    return chat_body([message], stream=True, max_tokens=num_tokens, min_tokens=num_tokens)


@functools.cache
def _picture(client: int) -> bytes:
    image = Image.open(_PICTURE).convert("RGB")
    image.putpixel((0, 0), (client, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read_outcomes(file: Path) -> list[Asked]:
    """Read the outcomes recorded so far; the last line may be incomplete."""
    lines = file.read_text().split("\n")[:-1]
    return [Asked(**json.loads(line)) for line in lines]


if __name__ == "__main__":
    main()
