"""Declared metrics follow Prometheus' rules, and every count of an engine and a cache is reported."""

import itertools
from dataclasses import fields
from typing import Any

import pytest

from deployments.metrics import (
    BLOCKS,
    CACHE_BYTES,
    CACHE_HITS,
    CACHE_MISSES,
    ERRORS,
    METRICS,
    STAGE_DURATION,
    Counter,
    Histogram,
    Unrecorded,
    cache_readings,
    engine_readings,
)
from llava_core.engine.stats import EngineStats
from llava_core.lru import LruCache


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
