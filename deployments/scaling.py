"""How many replicas a stage needs, computed from its load: a policy for Serve's autoscaler.

A signal is an amount of work, summed over a stage's replicas, such as queued tiles or the share of a cache in use.
Divided by its target, the amount that one replica may have, it gives the number of replicas it asks for; the largest
number wins. Pure arithmetic: knows neither what the signals mean nor which stage it scales. Bounds, delays and scaling
from zero are up to Serve (docs/scaling.md), which sends this file to its controller: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

# Not reported by replicas: all requests that Serve knows of, in replicas and in the queues of gateways.
REQUESTS = "requests"
# Reported by replicas: the number of requests that make up the other amounts.
HELD_REQUESTS = "held_requests"
# A share of time, at most 1 per replica. Requests queued in gateways are not extrapolated into it.
BUSY = "busy"
# Sums of shares are inexact; no replica is started for less than this.
_ROUNDING = 1e-6


class Context(Protocol):
    """The part of Serve's AutoscalingContext that is used here. Metrics are means over the look-back period."""

    # The replicas that run now, and how many there should be by the decisions so far.
    current_num_replicas: int
    target_num_replicas: int
    running_replicas: Sequence[Any]

    @property
    def total_num_requests(self) -> float:
        """Requests in replicas and in the queues of gateways."""
        ...

    @property
    def total_queued_requests(self) -> float:
        """Requests in the queues only."""
        ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What replicas report, by name and replica."""
        ...


class LoadPolicy:
    """Called for the number of replicas, and for state to keep until the next call, of which there is none.

    Changes the current target number only where it is too small, or too large by more than `tolerance`.
    """

    def __init__(self, targets: Mapping[str, float], tolerance: float) -> None:
        self._targets = dict(targets)
        self._tolerance = tolerance

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """Called by Serve's controller."""
        present = context.target_num_replicas
        if context.current_num_replicas == 0:
            # No replica reports anything. Serve itself starts the first one when there is a request.
            return present, {}
        amounts = self._amounts(context)
        known = {name: value for name, value in amounts.items() if value is not None}
        needed = max((value / self._targets[name] for name, value in known.items()), default=0.0)
        wanted = clamp(present, needed, self._tolerance)
        if len(known) < len(amounts):
            # A replica that has just started or stopped reports nothing, and may be the busiest: keep them all.
            wanted = max(wanted, present)
        # A request on its way to a replica is not yet in the amounts.
        return max(wanted, 1 if context.total_num_requests > 0 else 0), {}

    def _amounts(self, context: Context) -> dict[str, float | None]:
        """The total amount of each signal with a target; None where a running replica does not report it."""
        told = context.aggregated_metrics or {}
        replicas = set(context.running_replicas)
        held = _sum(told.get(HELD_REQUESTS, {}), replicas)
        # Requests queued in gateways are assumed to be like those in replicas.
        growth = 1 + context.total_queued_requests / held if held else 1.0
        amounts = {name: _sum(told.get(name, {}), replicas) for name in self._targets}
        amounts = {name: each if each is None or name == BUSY else each * growth for name, each in amounts.items()}
        return amounts | ({REQUESTS: context.total_num_requests} if REQUESTS in amounts else {})


def clamp(present: int, needed: float, tolerance: float) -> int:
    """The number nearest to `present` that is enough for `needed`, and too large by no more than `tolerance`."""
    fewest = math.ceil(needed - _ROUNDING)
    most = math.ceil(needed * (1 + tolerance) - _ROUNDING)
    return max(fewest, min(present, most))


def _sum(values: Mapping[Hashable, float], replicas: set[Hashable]) -> float | None:
    return sum(values[each] for each in replicas) if replicas <= values.keys() else None
