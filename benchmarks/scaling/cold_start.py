"""From a request that finds no generator to its first token: which step has taken how long.

Steps are told apart by what Serve and the replica say of themselves. Knows nothing of load.
"""

from __future__ import annotations

import asyncio
import re
import time
from datetime import datetime
from pathlib import Path

from benchmarks.scaling.load import ask
from benchmarks.scaling.watch import Watch

_STAGE = "Generator"
_STARTED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*started: (.+)$", re.MULTILINE)
_PHASE = re.compile(r"(\w+) ([\d.]+) s")


def measure(port: int, logs: Path, watch: Watch, *, needs_node: bool) -> dict[str, float]:
    """Seconds of each step, in their order, and of all together. The stage must have no replica."""
    began, first_sample = time.time(), len(watch.samples)
    clock = time.perf_counter()
    # Without a picture, so that no other stage has to start.
    answer = asyncio.run(ask(port, "What is a circle?", None, num_tokens=8))
    if answer.error:
        raise SystemExit(f"the request that found no replica failed: {answer.error}")
    first_token = began + answer.texts[0] - clock
    started, phases = _told(logs, after=began)
    samples = watch.samples[first_sample:]
    decided = next(sample.when for sample in samples if sample.starting[_STAGE] or sample.running[_STAGE])
    fewest = samples[0].nodes
    node = next((sample.when for sample in samples if sample.nodes > fewest), decided) if needs_node else decided
    running = max(started, next(sample.when for sample in samples if sample.running[_STAGE]))
    constructed = started - sum(phases.values())
    steps = {
        "decision": decided - began,
        "node": max(0.0, node - decided),
        "process": constructed - max(node, decided),
        **phases,
        "told to the gateway": min(running, first_token) - started,
        "answer": max(0.0, first_token - running),
    }
    return {name: round(seconds, 2) for name, seconds in {**steps, "in all": first_token - began}.items()}


def _told(logs: Path, *, after: float) -> tuple[float, dict[str, float]]:
    """When the newest replica's constructor had done its work, and what its phases took."""
    told = [
        (datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp(), phases)
        for log in logs.glob(f"replica_*_{_STAGE}_*.log")
        for when, phases in _STARTED.findall(log.read_text(errors="replace"))
    ]
    when, phases = max(told)
    assert when > after, "no replica has started since"
    return when, {name: float(seconds) for name, seconds in _PHASE.findall(phases)}
