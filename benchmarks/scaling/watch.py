"""Samples the replicas of each stage and the nodes of the cluster in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve


@dataclass(frozen=True)
class Sample:
    """`when` is by time.time; `running` and `starting` count the replicas in these states by stage."""

    when: float
    clients: int
    nodes: int
    running: dict[str, int]
    starting: dict[str, int]


@dataclass
class Watch:
    """A thread that takes a sample every `pause_s`. `samples` holds those taken so far."""

    num_clients: Callable[[], int]
    pause_s: float
    samples: list[Sample] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def wait_for(self, is_so: Callable[[Sample], bool], *, deadline_s: float) -> Sample:
        """Return the first sample from now on for which `is_so` holds. Exits the program if there is none in time."""
        first, deadline = len(self.samples), time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            found = [sample for sample in self.samples[first:] if is_so(sample)]
            if found:
                return found[0]
            time.sleep(self.pause_s)
        raise SystemExit(f"the awaited state was not reached in {deadline_s:g} s; last seen: {self.samples[-1]}")

    def _run(self) -> None:
        while not self._is_over.wait(self.pause_s):
            self.samples.append(look(self.num_clients()))


def look(clients: int) -> Sample:
    """Take one sample."""
    [application] = serve.status().applications.values()
    states: dict[str, Any] = {name: each.replica_states for name, each in application.deployments.items()}
    described: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return Sample(
        time.time(),
        clients,
        sum(each["Alive"] for each in described),
        {name: each.get("RUNNING", 0) for name, each in states.items()},
        {name: each.get("STARTING", 0) for name, each in states.items()},
    )
