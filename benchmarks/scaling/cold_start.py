"""From a request that finds no generator to its first token: how long each step takes.

Steps are told apart by Serve's status and the replica's log. Knows nothing of load.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.scaling.load import ask
from benchmarks.scaling.watch import Sample, Watch

_STAGE = "Generator"
_STARTED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*started: (.+)$", re.MULTILINE)
_PHASE = re.compile(r"(\w+) ([\d.]+) s")


def measure(port: int, logs: Path, watch: Watch, *, needs_node: bool) -> dict[str, float]:
    """Return the seconds of each step, in order, and in all. The stage must have no replica."""
    began, first_sample = time.time(), len(watch.samples)
    clock = time.perf_counter()
    # Without a picture, so that no other stage has to start.
    answer = asyncio.run(ask(port, "What is a circle?", None, num_tokens=8))
    if answer.error:
        raise SystemExit(f"the request that found no replica failed: {answer.error}")
    first_token = began + answer.texts[0] - clock
    started, phases = started_after(began, logs)
    return split(watch.samples[first_sample:], began, first_token, started, phases, needs_node=needs_node)


def split(
    samples: Sequence[Sample],
    began: float,
    first_token: float,
    started: float,
    phases: Mapping[str, float],
    *,
    needs_node: bool,
) -> dict[str, float]:
    """Split a cold start into steps. Times are by time.time: when the request began and had its first token, and when
    the constructor had finished; `phases` are the constructor's, in seconds."""
    decided = next(each.when for each in samples if each.starting[_STAGE] or each.running[_STAGE])
    fewest = samples[0].nodes
    node = next(each.when for each in samples if each.nodes > fewest) if needs_node else decided
    # The gateway may know the replica before a sample shows it.
    running = min(first_token, next((each.when for each in samples if each.running[_STAGE]), first_token))
    steps = {
        "decision": decided - began,
        "node": node - decided,
        "process": started - sum(phases.values()) - node,
        **phases,
        "known to the gateway": running - started,
        "answer": first_token - running,
    }
    # Two clocks and the sampling interval may make steps slightly negative.
    rounded = {name: round(max(0.0, seconds), 2) for name, seconds in steps.items()}
    return {**rounded, "in all": round(first_token - began, 2)}


def started_after(began: float, logs: Path) -> tuple[float, dict[str, float]]:
    """Return when the newest replica's constructor had finished, and the seconds of its phases."""
    told = [
        (datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp(), phases)
        for log in logs.glob(f"replica_*_{_STAGE}_*.log")
        for when, phases in _STARTED.findall(log.read_text(errors="replace"))
    ]
    when, phases = max(told, default=(0.0, ""))
    assert when > began, "no replica has started since"
    return when, {name: float(seconds) for name, seconds in _PHASE.findall(phases)}
