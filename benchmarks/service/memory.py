"""Memory of the service's processes under load: where each began, where it ended, and how much it grew.

Each process's private memory is separated from what all of them share, which is Ray's object store. The store never
returns a page that has been touched, and touches more pages whenever more objects than ever are in transit, up to its
configured size; so what shows a leak is the objects in it. Growth is that of a line fitted through all samples, so that
no peak or dip at either end decides. Knows nothing about loads.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from benchmarks.peers.contenders import part_of
from deployments.commands.top import STORED, Page

# The growth over the whole load that still counts as flat: allocators return memory when they like.
ALLOWED_MIB, ALLOWED_SHARE = 4.0, 0.02
SHARED, OBJECTS = "shared by all", "objects in Ray's store"
_SHOWN = 20

# MiB by process, at a time in seconds.
Sample = tuple[float, Mapping[str, float]]


@dataclass(frozen=True)
class Growth:
    """MiB at the start and at the end, on the line through all samples; the line's slope; and some of the samples."""

    start_mib: float
    end_mib: float
    mib_per_minute: float
    samples_mib: tuple[float, ...] = ()

    @property
    def over_allowed(self) -> float:
        """The growth relative to what is allowed: up to 1 is flat."""
        return (self.end_mib - self.start_mib) / max(ALLOWED_MIB, ALLOWED_SHARE * self.start_mib)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(processes: Sequence[psutil.Process]) -> dict[str, float]:
    """Return each process's private MiB, by its name and pid, and the MiB that they share."""
    found: dict[str, float] = {}
    shared = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory, name = process.memory_full_info(), part_of(process) or process.name()
            found[f"{name} {process.pid}"] = memory.uss / 2**20
            # This process's part of the shared pages.
            shared += memory.pss - memory.uss
    return found | {SHARED: shared / 2**20}


def stored(page: Page) -> dict[str, float]:
    """Return the MiB of the objects in Ray's store, as its node last reported them, which it does every 10 seconds."""
    return {OBJECTS: page.total(STORED, Location="MMAP_SHM") / 2**20}


def worst(grown: Mapping[str, Growth]) -> str:
    """Return the name of what has grown most over what is allowed; the store's touched pages do not count."""
    return max(grown.keys() - {SHARED}, key=lambda name: grown[name].over_allowed)


def growth(samples: Sequence[Sample]) -> dict[str, Growth]:
    """Return the growth of every process that is in all samples."""
    times = [when for when, _ in samples]
    constant = set.intersection(*({*found} for _, found in samples))
    return {name: _line(times, [found[name] for _, found in samples]) for name in sorted(constant)}


def _line(times: Sequence[float], values: Sequence[float]) -> Growth:
    slope, intercept = statistics.linear_regression(times, values)
    start, end = (round(intercept + slope * when, 2) for when in (times[0], times[-1]))
    shown = tuple(round(value, 1) for value in values[:: max(1, len(values) // _SHOWN)])
    return Growth(start, end, round(slope * 60, 3), shown)
