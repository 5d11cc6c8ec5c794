"""How many replicas a stage needs, reckoned from how much there is to do: a policy for Serve's autoscaler.

A signal is an amount of work that adds up over a stage's replicas: pictures' tiles that wait, shares of caches in use.
Over its target, which is what one replica may have, it is the number of replicas that it asks for, and the largest
number counts. Arithmetic alone: knows neither what the signals mean nor which stage it scales. Bounds, delays and the
first replica of none are Serve's (docs/scaling.md), which sends this file to its controller: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

# Not told by replicas: all requests that Serve knows of, in replicas and in the queues of gateways.
REQUESTS = "requests"
# Told by replicas: how many requests the other amounts are of.
HELD_REQUESTS = "held_requests"
# Of such a share each replica has 1 at most. Requests that wait in gateways make no difference to it.
BUSY = "busy"
# Sums of shares are not exact; no replica is started for less than this.
_ROUNDING = 1e-6


class Context(Protocol):
    """What is used here of Serve's AutoscalingContext. Metrics are means over the look-back period."""

    # Replicas that run; how many there are to be, by the decisions so far.
    current_num_replicas: int
    target_num_replicas: int
    running_replicas: Sequence[Any]

    @property
    def total_num_requests(self) -> float:
        """In replicas and in the queues of gateways."""
        ...

    @property
    def total_queued_requests(self) -> float:
        """Those in the queues alone."""
        ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What replicas tell of themselves, by name and replica."""
        ...


class LoadPolicy:
    """Callable for the number of replicas, with what is to be kept until the next call, which is nothing.

    It moves only where the number that there is to be is too small, or too large by more than `tolerance`.
    """

    def __init__(self, targets: Mapping[str, float], tolerance: float) -> None:
        self._targets = dict(targets)
        self._tolerance = tolerance

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """For Serve's controller."""
        present = context.target_num_replicas
        if context.current_num_replicas == 0:
            # Nobody can tell. Serve itself starts the first replica when there is a request.
            return present, {}
        amounts = self._amounts(context)
        known = {name: value for name, value in amounts.items() if value is not None}
        needed = max((value / self._targets[name] for name, value in known.items()), default=0.0)
        wanted = clamp(present, needed, self._tolerance)
        if len(known) < len(amounts):
            # A replica that has just come, or gone, and may have more to do than the others: no reason to have fewer.
            wanted = max(wanted, present)
        # A request that is under way to a replica is none of its amounts yet.
        return max(wanted, 1 if context.total_num_requests > 0 else 0), {}

    def _amounts(self, context: Context) -> dict[str, float | None]:
        """Of each signal with a target, what there is in all; None where a running replica does not tell."""
        told = context.aggregated_metrics or {}
        replicas = set(context.running_replicas)
        held = _sum(told.get(HELD_REQUESTS, {}), replicas)
        # What waits in gateways is taken to be like what replicas hold.
        growth = 1 + context.total_queued_requests / held if held else 1.0
        amounts = {name: _sum(told.get(name, {}), replicas) for name in self._targets}
        amounts = {name: each if each is None or name == BUSY else each * growth for name, each in amounts.items()}
        return amounts | ({REQUESTS: context.total_num_requests} if REQUESTS in amounts else {})


def clamp(present: int, needed: float, tolerance: float) -> int:
    """The number nearest to the `present` one that is enough for `needed`, and no more than `tolerance` too large."""
    fewest = math.ceil(needed - _ROUNDING)
    most = math.ceil(needed * (1 + tolerance) - _ROUNDING)
    return max(fewest, min(present, most))


def _sum(values: Mapping[Hashable, float], replicas: set[Hashable]) -> float | None:
    return sum(values[each] for each in replicas) if replicas <= values.keys() else None
