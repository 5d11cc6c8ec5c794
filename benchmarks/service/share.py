"""The service compared with the engine alone on `mid`, 8 clients: its share of the tokens per second, its added TTFT.

Three contenders take turns, each given the same requests by as many clients in a closed loop: the service over HTTP,
with base64 in JSON and server-sent events; the same engine in a separate process (alone.py), where prompts are
tokenized and pictures encoded beforehand; and an empty Ray Serve graph with as many hops, which gets the same bodies
and computes nothing. There are two pictures, which all have seen before, so that neither side encodes and only
generation is measured. Questions are new, and answers vary in length, so that clients do not march in step.

The share is the service's tokens per second over the engine's, in each round; the median counts. The time that the
service adds to the first token is the difference between the two medians over all rounds, and for the 99th percentile
the difference between the two 99th percentiles: not that of single requests, because requests wait for each other
differently. Both are divided by the empty graph's own median and 99th percentile.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.__main__ import start_empty_graph
from benchmarks.peers.load import Answer, make_requests, percentile, run_load, summarize
from benchmarks.ports import free_port
from benchmarks.service.alone import EngineAlone
from benchmarks.service.bars import Bar
from benchmarks.service.start import checkpoint
from deployments.launch.launcher import LocalService
from deployments.launch.plan import plan_launch

_CLIENTS, _PICTURES = 8, 2
_LENGTHS = (32, 96)
_LEAST_SHARE, _MOST_ADDED = 0.9, {0.5: 1.5, 0.99: 2.0}
SERVICE, ENGINE, EMPTY = "service", "engine alone", "empty graph"

# The answers of one round, and the seconds they took.
Round = tuple[Sequence[Answer], float]


def run(num_rounds: int, num_requests: int, mid: Path | None) -> tuple[list[Bar], dict[str, Any]]:
    """Return the bars, and the figures behind them."""
    bodies = vary(make_requests("share", (num_rounds + 1) * num_requests, _PICTURES))
    rounds: dict[str, list[Round]] = {SERVICE: [], ENGINE: [], EMPTY: []}
    with checkpoint("mid", mid) as folder:
        service, engine = LocalService(plan_launch(model=str(folder), port=free_port(), metrics_port=0)), None
        try:
            service.start(lambda line: print(line, file=sys.stderr))
            balancer = start_empty_graph(service)
            engine = EngineAlone(folder)
            port, empty_port = service.plan.port, balancer.address[1]
            for turn in range(num_rounds + 1):
                asked = bodies[turn * num_requests : (turn + 1) * num_requests]
                rounds[SERVICE].append(run_load(port, asked, _CLIENTS))
                rounds[ENGINE].append(engine.ask(asked, _CLIENTS))
                rounds[EMPTY].append(run_load(empty_port, asked, _CLIENTS, path="/empty"))
            balancer.stop()
        finally:
            if engine is not None:
                engine.close()
            service.stop()
    # The first round warms up.
    return judge_rounds({name: each[1:] for name, each in rounds.items()})


def vary(bodies: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Vary the lengths of the answers, identically for all contenders."""
    low, high = _LENGTHS
    return [{**body, "max_tokens": low + index * 29 % (high - low + 1)} for index, body in enumerate(bodies)]


def judge_rounds(rounds: dict[str, list[Round]]) -> tuple[list[Bar], dict[str, Any]]:
    """Build bars and figures from the rounds of the three contenders."""
    failed = sum(bool(answer.error) for answers, _ in rounds[SERVICE] for answer in answers)
    pairs = zip(rounds[SERVICE], rounds[ENGINE], strict=True)
    shares = [_tokens_per_s(ours) / _tokens_per_s(alone) for ours, alone in pairs]
    first = {name: {q: percentile(_first(each), q) for q in _MOST_ADDED} for name, each in rounds.items()}
    added = {q: first[SERVICE][q] - first[ENGINE][q] for q in _MOST_ADDED}
    bars = [
        Bar("requests that failed", failed, "=", 0),
        Bar("tokens per second over the engine's alone", statistics.median(shares), "≥", _LEAST_SHARE),
        *(
            Bar(f"added to the first token over the empty graph, {name}", added[q] / first[EMPTY][q], "≤", most)
            for (q, most), name in zip(_MOST_ADDED.items(), ("median", "99 %"), strict=True)
        ),
    ]
    return bars, {
        "shares": [round(share, 3) for share in shares],
        "added_first_ms": {f"p{100 * q:g}": round(value, 1) for q, value in added.items()},
        **{name: _figures(rounds[name]) for name in (SERVICE, ENGINE)},
        EMPTY: {f"first_ms_p{100 * q:g}": value for q, value in first[EMPTY].items()},
    }


def _tokens_per_s(measured: Round) -> float:
    answers, wall = measured
    return sum(answer.tokens for answer in answers) / wall


def _first(rounds: Sequence[Round]) -> list[float]:
    return [each.texts[0] - each.began for answers, _ in rounds for each in answers if not each.error]


def _figures(rounds: Sequence[Round]) -> dict[str, float]:
    return summarize([answer for answers, _ in rounds for answer in answers], sum(wall for _, wall in rounds))
