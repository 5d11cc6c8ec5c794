"""A mixed load on the default model: errors, equal answers, memory, the engine's slots, and how soon they are freed.

Several clients send the requests that mix.py draws, with think times that keep the machine about 70 % busy. The engine
has exactly as many slots as the clients can use at once, and no queue; a client that has hung up returns a second
later. If a slot is not free by then, a request may be refused for lack of it: an error like any other. At regular times
all clients pause: every slot must be free then, and hangups.py measures how soon all are free again after a hang-up of
all clients.

The picture caches are small, so that they are full before memory is measured, which begins after a fifth of the time,
at most two minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.exchange import exchange, read_response
from benchmarks.peers.contenders import part_of
from benchmarks.peers.load import percentile
from benchmarks.service import memory
from benchmarks.service.bars import Bar
from benchmarks.service.hangups import all_are_free, seconds_to_free
from benchmarks.service.mix import MOST_ANSWERS, Ask, Mix, Outcome, judge
from benchmarks.service.start import Service, serving
from deployments.commands.top import ONGOING, QUEUED, Page
from deployments.metrics import BLOCKS, ERRORS, HTTP_REQUESTS, PREEMPTIONS, RUNNING, WAITING

FREED_S = 1.0
_BUSY = 0.7
_SAMPLE_S, _FIRST_THINK_S, _MOST_THINK_S = 5.0, 0.5, 5.0
# Ray's processes report their metrics at this interval, by default every 10 s; stages update theirs every second.
_TOLD_EVERY_MS = "RAY_metrics_report_interval_ms"
_TOLD_S = float(os.environ.get(_TOLD_EVERY_MS, "10000")) / 1e3 + 2.0
# Many times the duration of an answer.
_PATIENCE_S = 120.0
_CACHE_BYTES = 8 * 2**20


@dataclass
class Seen:
    """The results of a load."""

    outcomes: list[Outcome] = field(default_factory=list)
    num_left: Counter[str] = field(default_factory=Counter)
    samples: list[memory.Sample] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    freed_s: list[float] = field(default_factory=list)
    stuck: int = 0


def run(minutes: float, *, clients: int = 8, pause_s: float = 30.0, seed: int = 0) -> tuple[list[Bar], dict[str, Any]]:
    """Return the bars, and more figures."""
    places = clients * MOST_ANSWERS
    args = {
        "engine": {"max_running": places, "max_waiting": 0},
        "preprocessor": {"cache_bytes": _CACHE_BYTES},
        "vision_encoder": {"cache_bytes": _CACHE_BYTES},
    }
    with serving(args=args) as service:
        load = _Load(service, places, seed)
        before = _parts(service)
        asyncio.run(load.run(clients, minutes * 60, pause_s))
        time.sleep(_TOLD_S)
        page = service.metrics()
        replaced = len(before - _parts(service))
    return judge_load(load.seen, page, replaced), figures(load.seen, page)


class _Load:
    def __init__(self, service: Service, places: int, seed: int) -> None:
        self._service, self._places = service, places
        self._mix = Mix(service.port, seed)
        self._chance = random.Random(f"load:{seed}")
        self._think_s = _FIRST_THINK_S
        # Whether clients may send requests, and whether none is in flight.
        self._is_open, self._is_quiet = asyncio.Event(), asyncio.Event()
        self._is_quiet.set()
        self._active = 0
        self._end = 0.0
        self.seen = Seen()

    async def run(self, clients: int, seconds: float, pause_s: float) -> None:
        began = time.monotonic()
        self._end = began + seconds
        self._is_open.set()
        watching = asyncio.ensure_future(self._watch(began + min(120.0, seconds / 5), min(_SAMPLE_S, seconds / 20)))
        asking = [asyncio.ensure_future(self._client()) for _ in range(clients)]
        while time.monotonic() < self._end:
            await asyncio.wait(asking, timeout=min(pause_s, self._end - time.monotonic()))
            # An exception in a client ends the run.
            for client in asking:
                if client.done():
                    client.result()
            await self._pause()
        await asyncio.gather(watching, *asking)

    async def _client(self) -> None:
        while time.monotonic() < self._end:
            await self._is_open.wait()
            self._active += 1
            self._is_quiet.clear()
            try:
                await self._ask_one()
            finally:
                self._active -= 1
                if not self._active:
                    self._is_quiet.set()
            await asyncio.sleep(min(self._chance.expovariate(1 / self._think_s), 3 * self._think_s))

    async def _ask_one(self) -> None:
        # Encoding a large picture must not keep the other clients from reading.
        ask = await asyncio.to_thread(self._mix.next)
        began = time.perf_counter()
        try:
            asked = exchange(self._service.port, ask.message, most_pieces=ask.pieces)
            pieces = await asyncio.wait_for(asked, ask.leave_after_s or _PATIENCE_S)
        except TimeoutError:
            if ask.leave_after_s is None:
                self.seen.outcomes.append(Outcome(ask, f"no answer within {_PATIENCE_S:g} s"))
            else:
                await self._left(ask)
            return
        except OSError as error:
            self.seen.outcomes.append(Outcome(ask, f"{type(error).__name__}: {error}"))
            return
        if len(pieces) == ask.pieces and read_response(pieces).status == ask.status:
            await self._left(ask)
            return
        self.seen.outcomes.append(judge(ask, began, pieces))

    async def _left(self, ask: Ask) -> None:
        self.seen.num_left[ask.kind] += 1
        await asyncio.sleep(FREED_S)

    async def _pause(self) -> None:
        self._is_open.clear()
        await self._is_quiet.wait()
        port, kinds = self._service.port, ("hang-up, streaming", "hang-up, waiting")
        self.seen.stuck += not await all_are_free(port, self._places)
        messages = [self._mix.hang_up(kinds[index % 2]).message for index in range(self._places)]
        self.seen.freed_s.append(await seconds_to_free(port, self._places, messages))
        self._is_open.set()

    async def _watch(self, warm: float, interval_s: float) -> None:
        """Sample memory once the service is warm, and adjust think times to keep the machine as busy as intended."""
        psutil.cpu_percent()
        while time.monotonic() < self._end:
            await asyncio.sleep(interval_s)
            if self._is_open.is_set():
                busy = psutil.cpu_percent() / 100
                self._think_s = min(max(self._think_s * busy / _BUSY, 0.02), _MOST_THINK_S)
                self.seen.busy.append(busy)
            if time.monotonic() >= warm:
                processes = self._service.server.processes()
                found = await asyncio.to_thread(memory.measure, processes)
                found |= memory.stored(await asyncio.to_thread(self._service.metrics))
                self.seen.samples.append((time.monotonic(), found))


def _parts(service: Service) -> set[int]:
    """Return the pids of the stages' processes, none of which may be replaced."""
    return {process.pid for process in service.server.processes() if part_of(process)}


def judge_load(seen: Seen, page: Page, num_replaced: int) -> list[Bar]:
    """Build the bars of a load from what its clients saw and from the metrics afterwards."""
    grown = memory.growth(seen.samples)
    worst = memory.worst(grown)
    statuses = [status for status in page.values(HTTP_REQUESTS, "status") if status >= "500"]
    told = sum(page.total(HTTP_REQUESTS, status=status) for status in statuses)
    at_work = sum(page.total(gauge) for gauge in (RUNNING, WAITING, ONGOING, QUEUED))
    return [
        Bar("requests answered as they should not be", sum(bool(each.error) for each in seen.outcomes), "=", 0),
        Bar("5xx that the service counted", told, "=", 0),
        Bar("repeated greedy requests with several answers", len(differing(seen.outcomes)), "=", 0),
        Bar("replicas that were replaced", num_replaced, "=", 0),
        Bar(f"memory's growth over what is allowed, at most ({worst})", grown[worst].over_allowed, "≤", 1),
        Bar("pauses in which a place was still taken", seen.stuck, "=", 0),
        Bar("requests at work or waiting afterwards", at_work, "=", 0),
        Bar("blocks in use afterwards", page.total(BLOCKS, state="used"), "=", 0),
        Bar("longest from hang-ups until all places were free", max(seen.freed_s), "≤", FREED_S, "s"),
    ]


def differing(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """Return the answers to each greedy question that got different ones."""
    texts: dict[str, set[str]] = defaultdict(set)
    for outcome in outcomes:
        if outcome.ask.same and not outcome.error:
            for question, text in zip(outcome.ask.same, outcome.texts, strict=True):
                texts[question].add(text)
    return {question: sorted(found) for question, found in texts.items() if len(found) > 1}


def figures(seen: Seen, page: Page) -> dict[str, Any]:
    """Return the figures that are not in the bars."""
    good = [each for each in seen.outcomes if not each.error and each.ask.status == 200]
    errors = Counter(f"{each.ask.kind}: {each.error}" for each in seen.outcomes if each.error)
    busy = seen.busy or [0.0]
    return {
        "requests": dict(Counter(each.ask.kind for each in seen.outcomes) + seen.num_left),
        "processor_busy": round(sum(busy) / len(busy), 2),
        "total_ms_p50": percentile([each.total_s for each in good], 0.5),
        "total_ms_p99": percentile([each.total_s for each in good], 0.99),
        "errors": dict(errors.most_common(20)),
        "differing": dict(list(differing(seen.outcomes).items())[:5]),
        "freed_ms": [round(seconds * 1e3, 1) for seconds in seen.freed_s],
        "errors_told": {code: page.total(ERRORS, code=code) for code in page.values(ERRORS, "code")},
        "preemptions": page.total(PREEMPTIONS),
        "memory_mib": {name: each.as_json() for name, each in memory.growth(seen.samples).items()},
    }
