"""Declared metrics follow Prometheus' rules, and recorded values reach Ray, here a stand-in, correctly."""

import itertools
import threading
from dataclasses import fields
from typing import Any

import pytest

from deployments import metrics
from deployments.metrics import (
    BLOCKS,
    CACHE_BYTES,
    CACHE_HITS,
    CACHE_MISSES,
    ERRORS,
    METRICS,
    PROMPT_TOKENS,
    RUNNING,
    STAGE_DURATION,
    STEPS,
    Counter,
    Histogram,
    Metric,
    RayRecorder,
    Reading,
    Unrecorded,
    cache_readings,
    engine_readings,
)
from llava_core.engine.stats import EngineStats
from llava_core.lru import LruCache

Sent = list[tuple[str, float, dict[str, str]]]


def test_names_follow_prometheus_conventions() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) > 25
    for metric in METRICS:
        assert metric.name.startswith("llava_")
        assert metric.name.endswith("_total") == isinstance(metric, Counter)
        assert metric.description.endswith(".")
        # Serve's own labels, which Ray would refuse; labels that the exporter adds; and anything a client can make up.
        assert not {"deployment", "replica", "application", "le", "request_id", "key", "user", "path"} & {
            *metric.labels
        }


@pytest.mark.parametrize("histogram", [each for each in METRICS if isinstance(each, Histogram)], ids=lambda h: h.name)
def test_buckets_ascend_by_a_factor_of_at_most_five(histogram: Histogram) -> None:
    assert all(1 < after / before <= 5 for before, after in itertools.pairwise(histogram.buckets))
    # Each bucket is a separate series, for every replica.
    assert len(histogram.buckets) <= 16


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What Ray was sent."""
    received: Sent = []

    class Fake:
        def __init__(self, metric: Metric) -> None:
            self._name = metric.name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses it"
            received.append((self._name, value, tags))

        set = observe = lambda self, value, tags: received.append((self._name, value, tags))

    monkeypatch.setattr(metrics, "_ray_metric", Fake)
    return received


def test_counts_are_published_together_and_once(sent: Sent) -> None:
    recorder = RayRecorder()
    for code in ("overloaded", "not_found", "overloaded"):
        recorder.count(ERRORS, code)
    recorder.count(PROMPT_TOKENS, by=40)
    recorder.count(PROMPT_TOKENS, by=0)
    assert sent == []
    recorder.publish()
    recorder.publish()
    assert sorted(sent, key=str) == [
        ("llava_errors_total", 1, {"code": "not_found"}),
        ("llava_errors_total", 2, {"code": "overloaded"}),
        ("llava_prompt_tokens_total", 40, {}),
    ]


def test_observations_are_published_at_once(sent: Sent) -> None:
    RayRecorder().observe(STAGE_DURATION, 0.25, "encode")
    assert sent == [("llava_stage_duration_seconds", 0.25, {"stage": "encode"})]


def test_watched_totals_are_published_as_increments_and_gauges_as_values(sent: Sent) -> None:
    recorder = RayRecorder()
    steps = iter([5.0, 5.0, 12.0])

    def read() -> list[Reading]:
        return [(STEPS, next(steps), ()), (RUNNING, 3, ())]

    recorder.watch(read)
    for _ in range(3):
        recorder.publish()
    assert [value for name, value, _ in sent if name == STEPS.name] == [5, 7]
    assert [value for name, value, _ in sent if name == RUNNING.name] == [3, 3, 3]


def test_missing_labels_are_an_error(sent: Sent) -> None:
    with pytest.raises(ValueError, match="shorter"):
        RayRecorder().observe(STAGE_DURATION, 0.25)
    assert sent == []


@pytest.mark.parametrize("interruption", ["count", "publish"])
def test_no_count_is_lost_if_another_thread_interrupts_it(sent: Sent, interruption: str) -> None:
    recorder = RayRecorder()
    other = threading.Thread(
        target=recorder.publish if interruption == "publish" else lambda: recorder.count(ERRORS, "x")
    )

    class Interrupted(float):
        def __radd__(self, total: float) -> float:
            other.start()
            # Only an interruption that should have been impossible ends meanwhile.
            other.join(0.2)
            return total + float(self)

    recorder.count(ERRORS, "x", by=Interrupted(1))
    other.join()
    recorder.publish()
    assert sum(value for _, value, _ in sent) == (1 if interruption == "publish" else 2)


def test_every_engine_statistic_is_reported() -> None:
    numbers = {field.name: 1000 + place for place, field in enumerate(fields(EngineStats))}
    stats = EngineStats(**{**numbers, "num_blocks": 5000})  # type: ignore[arg-type]
    readings = engine_readings(stats)
    values = {value for _, value, _ in readings}
    assert {value for name, value in numbers.items() if name != "num_blocks"} <= values
    assert sum(value for metric, value, _ in readings if metric is BLOCKS) == stats.num_blocks
    assert all(len(labels) == len(metric.labels) for metric, _, labels in readings)


def test_a_cache_reports_its_hits_misses_and_bytes() -> None:
    cache: LruCache[str] = LruCache(100)
    cache.put("a", "x", 7)
    for key in ("a", "a", "b"):
        cache.get(key)
    readings: Any = cache_readings(cache, "tiles")
    assert readings == [(CACHE_HITS, 2, ("tiles",)), (CACHE_MISSES, 1, ("tiles",)), (CACHE_BYTES, 7, ("tiles",))]


def test_without_a_service_nothing_is_recorded() -> None:
    recorder = Unrecorded()
    recorder.count(ERRORS, "x")
    recorder.observe(STAGE_DURATION, 1.0, "encode")
    recorder.watch(lambda: pytest.fail("asked"))
