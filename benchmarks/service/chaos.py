"""Steady load on a service with two replicas of each stage, while a process is killed every few seconds.

Clients stream greedy and seeded answers about texts and pictures, and compare each with the one that the same question
got before anything was killed: its text, the tokens of its log-probabilities, its finish reason, its number of tokens.
One process of each kind gets SIGKILL in turn. A connection ends with the process that holds it: where the gateway or
HAProxy is killed, a client may retry as long as nothing of its answer has arrived, and answers that had begun break
off, which is counted separately. Ray's raylet and GCS are not killed: a service on one machine ends without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.exchange import exchange, post_json, read_response
from benchmarks.service import memory
from benchmarks.service.bars import Bar
from benchmarks.service.mix import QUESTIONS
from benchmarks.service.pictures import PictureMaker
from benchmarks.service.start import Service, serving

# What to kill, by a part of its processes' command lines.
KINDS = {
    "preprocessor": "ServeReplica:llava:Preprocessor",
    "encoder": "ServeReplica:llava:VisionEncoder",
    "generator": "ServeReplica:llava:Generator",
    "gateway": "ServeReplica:llava:Gateway",
    "controller": "ServeController",
    "HAProxy": "haproxy",
}
# The kinds that hold clients' connections.
ENTRANCES = {"gateway", "HAProxy"}
_TWO = {"min_replicas": 2, "max_replicas": 2}
# In single precision, answers do not depend on the composition of batches.
_COMPUTE = {**_TWO, "num_cpus": 0.05, "dtype": "float32"}
_ARGS = {"gateway": _TWO, "preprocessor": _TWO, "vision_encoder": _COMPUTE, "generator": _COMPUTE}
_PATIENCE_S, _PAUSE_S, _POLL_S = 60.0, 0.25, 0.1
_TEMPORARY = {0, 502, 503}


@dataclass(frozen=True)
class Answer:
    """The answer as a client received it; `done` is false where the stream broke off or ended with an error."""

    text: str = ""
    tokens: tuple[str, ...] = ()
    reason: str | None = None
    num_tokens: int = 0
    done: bool = False


@dataclass(frozen=True)
class Outcome:
    """One request: `kind` is what was last killed before it ended, `again` how often it was retried."""

    kind: str
    problem: str = ""
    again: int = 0
    gap_s: float = 0.0


@dataclass
class Seen:
    """The results of a load, and how long the recovery after each kill took."""

    outcomes: list[Outcome] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    memory_mib: list[float] = field(default_factory=list)


def run(minutes: float, *, clients: int = 4, every_s: float = 20.0) -> tuple[list[Bar], dict[str, Any]]:
    """Return the bars, and figures by what was killed. One process is killed every `every_s`, whether or not the last
    one has been replaced. Prints the figures as a table."""
    with serving(args=_ARGS) as service:
        load = _Load(service)
        asyncio.run(load.run(clients, minutes * 60, every_s))
    found = figures(load.seen)
    print(table(found["kinds"]))
    return judge(load.seen), found


def questions(port: int) -> list[bytes]:
    """Make streamed requests, each with a deterministic answer."""
    pictures = PictureMaker("chaos")
    messages = []
    for number in range(12):
        parts: list[object] = [pictures.make().part] if number % 3 else []
        parts.append({"type": "text", "text": f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"})
        drawn = {"temperature": 1.0, "seed": number} if number % 2 else {}
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 160, "ignore_eos": True, **drawn}
        options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": number % 4 < 2}
        messages.append(post_json(port, {**body, **options}))
    return messages


def read_answer(events: Sequence[bytes]) -> Answer:
    """Assemble an answer from a stream's events."""
    text, reason, num_tokens = "", None, 0
    tokens: list[str] = []
    for event in events:
        if event == b"[DONE]":
            return Answer(text, tuple(tokens), reason, num_tokens, done=True)
        body: Any = json.loads(event)
        if "error" in body:
            break
        num_tokens = (body["usage"] or {}).get("completion_tokens", 0)
        for choice in body["choices"]:
            text += choice["delta"].get("content") or ""
            tokens += [each["token"] for each in (choice["logprobs"] or {}).get("content") or []]
            reason = choice["finish_reason"] or reason
    return Answer(text, tuple(tokens), reason, num_tokens)


class _Load:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._questions = questions(service.port)
        self._expected: list[Answer] = []
        self._last = "nothing"
        self._is_over = False
        self.seen = Seen()

    async def run(self, clients: int, seconds: float, every_s: float) -> None:
        for message in self._questions:
            answer, _, _ = await self._ask(message)
            assert answer.done, answer
            self._expected.append(answer)
        self.seen.memory_mib.append(self._memory())
        asking = [asyncio.ensure_future(self._client(number)) for number in range(clients)]
        began = time.monotonic()
        recovering = []
        for number, kind in zip(range(1, math.ceil(seconds / every_s)), itertools.cycle(KINDS), strict=False):
            await asyncio.sleep(began + number * every_s - time.monotonic())
            recovering.append(asyncio.ensure_future(self._recover(kind, self._kill(kind))))
        await asyncio.sleep(began + seconds - time.monotonic())
        self._is_over = True
        await asyncio.gather(*asking, *recovering)
        self.seen.memory_mib.append(self._memory())

    async def _client(self, number: int) -> None:
        for index in itertools.count(number * 5):
            if self._is_over:
                return
            index %= len(self._questions)
            answer, again, gap_s = await self._ask(self._questions[index])
            problem = "" if answer == self._expected[index] else "wrong" if answer.done else "broken"
            self.seen.outcomes.append(Outcome(self._last, problem, again, gap_s))

    async def _ask(self, message: bytes) -> tuple[Answer, int, float]:
        """Send a request, retrying it while nothing arrives. Returns the answer, the number of retries, and the longest
        silence within the answer."""
        deadline = time.monotonic() + _PATIENCE_S
        again = -1
        while True:
            again, pieces = again + 1, []
            with contextlib.suppress(OSError, TimeoutError):
                pieces = await asyncio.wait_for(exchange(self._service.port, message), _PATIENCE_S)
            response = read_response(pieces)
            if response.status not in _TEMPORARY or time.monotonic() > deadline:
                break
            await asyncio.sleep(_PAUSE_S)
        events = [*response.events()] if response.status == 200 else []
        times = [when for when, _ in events]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return read_answer([data for _, data in events]), again, max(gaps, default=0.0)

    def _kill(self, kind: str) -> list[int]:
        """Kill one process of the kind: the first of the processes that are returned."""
        found = self._processes(kind)
        self._last = kind
        self.seen.kills[kind] += 1
        os.kill(found[0], signal.SIGKILL)
        return found

    async def _recover(self, kind: str, before: Sequence[int]) -> None:
        began = time.monotonic()
        while not await asyncio.to_thread(self._is_whole, kind, before):
            if time.monotonic() > began + _PATIENCE_S:
                break
            await asyncio.sleep(_POLL_S)
        self.seen.recovery_s.setdefault(kind, []).append(time.monotonic() - began)

    def _is_whole(self, kind: str, before: Sequence[int]) -> bool:
        """Whether the first of `before` has been replaced, and the service is healthy."""
        found = self._processes(kind)
        if len(found) < len(before) or before[0] in found:
            return False
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self._service.port}/health", timeout=5).status_code == 200
        return False

    def _processes(self, kind: str) -> list[int]:
        return [pid for pid, command in self._commands() if KINDS[kind] in command]

    def _commands(self) -> Iterator[tuple[int, str]]:
        for process in self._service.server.processes():
            with contextlib.suppress(psutil.Error):
                yield process.pid, " ".join(process.cmdline())

    def _memory(self) -> float:
        return sum(memory.measure(self._service.server.processes()).values())


def judge(seen: Seen) -> list[Bar]:
    """Build the bars: every answer complete and unchanged, except on connections that ended with their process."""
    broken = Counter(each.kind for each in seen.outcomes if each.problem == "broken")
    failed = sum(number for kind, number in broken.items() if kind not in ENTRANCES)
    others = [each for each in seen.outcomes if each.again and each.kind not in ENTRANCES]
    return [
        Bar("answers", len(seen.outcomes), "≥", 1),
        Bar("requests failed", failed, "=", 0),
        Bar("answers wrong", sum(each.problem == "wrong" for each in seen.outcomes), "=", 0),
        Bar("requests asked again though no entrance was killed", len(others), "=", 0),
    ]


def figures(seen: Seen) -> dict[str, Any]:
    """Return the figures by what was killed."""
    kinds = {}
    for kind in KINDS:
        of_kind = [each for each in seen.outcomes if each.kind == kind]
        kinds[kind] = {
            "kills": seen.kills[kind],
            "answers": len(of_kind),
            "broken_off": sum(each.problem == "broken" for each in of_kind),
            "asked_again": sum(bool(each.again) for each in of_kind),
            "longest_gap_s": round(max((each.gap_s for each in of_kind), default=0.0), 3),
            "recovery_s": [round(seconds, 1) for seconds in seen.recovery_s.get(kind, [])],
        }
    return {"kinds": kinds, "memory_mib": [round(each, 1) for each in seen.memory_mib]}


def table(kinds: dict[str, Any]) -> str:
    """Build a Markdown table."""
    rows = [
        "| killed | times | answers | broken off | asked again | longest gap, s | recovery, s |",
        "| --- |" + " ---: |" * 6,
    ]
    for kind, found in kinds.items():
        cells = [found[name] for name in ("kills", "answers", "broken_off", "asked_again", "longest_gap_s")]
        rows.append(f"| {kind} | {' | '.join(map(str, cells))} | {max(found['recovery_s'], default=0.0)} |")
    return "\n".join(rows)
