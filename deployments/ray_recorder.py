"""A process's metrics, sent to Ray: counts are kept and passed on once a second, observed values at once.

Each call into Ray takes about 4 µs. Ray itself is imported where it is used. Knows no metric by name.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from deployments.metrics import Counter, Histogram, Metric, Reading

logger = logging.getLogger(__name__)
_PUBLISH_S = 1.0


class RayRecorder:
    """Sends values to Ray's metrics, labelled as this replica's. `publish` sends those counted and those watched.

    A value that cannot be read or sent is missing, and the log has the reason, once: the others are still sent.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted: dict[tuple[Counter, tuple[str, ...]], float] = defaultdict(float)
        # Totals of watched counters that were already sent.
        self._handed_on: dict[tuple[Counter, tuple[str, ...]], float] = defaultdict(float)
        self._watched: list[Callable[[], Iterable[Reading]]] = []
        self._exported: dict[Metric, Any] = {}
        # What has failed, and how.
        self._logged: set[tuple[object, type[Exception]]] = set()

    def start(self) -> RayRecorder:
        """Publish once a second until the process ends."""
        threading.Thread(target=self._publish_for_ever, name="metrics", daemon=True).start()
        return self

    def count(self, counter: Counter, *labels: str, by: float = 1) -> None:
        """See Recorder."""
        with self._lock:
            self._counted[counter, labels] += by

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        """See Recorder."""
        self._export(histogram).observe(value, _tags(histogram, labels))

    def watch(self, read: Callable[[], Iterable[Reading]]) -> None:
        """See Recorder."""
        with self._lock:
            self._watched.append(read)

    def publish(self) -> None:
        """Sends all pending values. Must be called by one thread at a time."""
        with self._lock:
            counted, self._counted = self._counted, defaultdict(float)
            watched = tuple(self._watched)
        for read in watched:
            with self._going_on(read):
                for metric, value, labels in read():
                    if isinstance(metric, Counter):
                        counted[metric, labels] += value - self._handed_on[metric, labels]
                        self._handed_on[metric, labels] = value
                    else:
                        self._export(metric).set(value, _tags(metric, labels))
        for (counter, labels), by in counted.items():
            # Ray refuses increments of 0.
            if by > 0:
                with self._going_on(counter.name):
                    self._export(counter).inc(by, _tags(counter, labels))

    def _publish_for_ever(self) -> None:
        pause = threading.Event()
        while not pause.wait(_PUBLISH_S):
            self.publish()

    @contextlib.contextmanager
    def _going_on(self, what: object) -> Iterator[None]:
        """A context manager that keeps an exception of a block from the other values. Readings may raise anything,
        because other threads change what they read; and nobody would start this thread again."""
        try:
            yield
        except Exception as error:
            if (what, type(error)) not in self._logged:
                self._logged.add((what, type(error)))
                logger.exception("metrics are missing: %s", what)

    def _export(self, metric: Metric) -> Any:
        if metric not in self._exported:
            with self._lock:
                if metric not in self._exported:
                    self._exported[metric] = _ray_metric(metric)
        return self._exported[metric]


def _tags(metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(metric.labels, labels, strict=True))


def _ray_metric(metric: Metric) -> Any:
    # Serve's classes add its own labels, those of this process's replica.
    from ray.serve import metrics

    # Ray annotates it as a tuple of one.
    labels: Any = metric.labels
    if isinstance(metric, Histogram):
        return metrics.Histogram(metric.name, metric.description, boundaries=[*metric.buckets], tag_keys=labels)
    kind = metrics.Counter if isinstance(metric, Counter) else metrics.Gauge
    return kind(metric.name, metric.description, tag_keys=labels)
