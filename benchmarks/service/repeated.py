"""Time to the first token for a picture seen before, compared with a new one, on `mid`, with one client.

Each picture is asked about twice in a row, so that a temporary slowdown of the machine affects both. The second
question is a different one: only work that depends on the picture alone can be saved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.load import make_requests, run_load, summarize
from benchmarks.service.bars import Bar
from benchmarks.service.start import checkpoint, serving

_MOST = 0.25
_WARM_UP = 1
# Only the first one is measured.
_NUM_TOKENS = 4


def run(num_pictures: int, mid: Path | None) -> tuple[list[Bar], dict[str, Any]]:
    """Return the bars, and the figures behind them."""
    pictures = num_pictures + _WARM_UP
    # The second half repeats the same pictures with other questions.
    bodies = make_requests("repeated", 2 * pictures, pictures)
    pairs = zip(bodies[:pictures], bodies[pictures:], strict=True)
    turns = [{**body, "max_tokens": _NUM_TOKENS} for pair in pairs for body in pair]
    with checkpoint("mid", mid) as folder, serving(folder) as service:
        answers, wall = run_load(service.port, turns, 1)
    measured = answers[2 * _WARM_UP :]
    new, again = (summarize(measured[half::2], wall) for half in (0, 1))
    failed = new["errors"] + again["errors"]
    ratio = again["first_ms_p50"] / new["first_ms_p50"]
    bars = [
        Bar("requests that failed", failed, "=", 0),
        Bar("first token, a repeated picture over a new one, medians", ratio, "≤", _MOST),
    ]
    names = ("requests", "first_ms_p50", "first_ms_p99")
    return bars, {
        "new": {name: new[name] for name in names},
        "repeated": {name: again[name] for name in names},
    }
