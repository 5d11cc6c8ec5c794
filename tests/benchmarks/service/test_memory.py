"""Lines fitted to samples, and the memory of a process that allocates some."""

import os

import numpy as np
import psutil
import pytest

from benchmarks.service.memory import OBJECTS, SHARED, Growth, growth, measure, stored, worst
from deployments.commands.top import Page


def test_growth_is_fitted_for_processes_present_throughout() -> None:
    chance = np.random.default_rng(0)
    times = [float(5 * index) for index in range(100)]
    noisy = [100 + 0.1 * when + float(chance.normal(0, 3)) for when in times]
    samples = [
        (when, {"a 1": mib, "b 2": 50.0} | ({"c 3": 1.0} if when > 10 else {}))
        for when, mib in zip(times, noisy, strict=True)
    ]
    found = growth(samples)
    assert found.keys() == {"a 1", "b 2"}
    slope, start = np.polyfit(times, noisy, 1)
    assert found["a 1"].mib_per_minute == pytest.approx(60 * slope, abs=0.01)
    assert found["a 1"].start_mib == pytest.approx(start, abs=0.01)
    assert found["a 1"].end_mib == pytest.approx(start + slope * times[-1], abs=0.01)
    assert found["b 2"].over_allowed == 0
    assert 20 <= len(found["a 1"].samples_mib) <= 25


@pytest.mark.parametrize(
    ("start", "end", "over"), [(100, 104, 1), (100, 108, 2), (1000, 1020, 1), (1000, 990, -0.5), (10, 13, 0.75)]
)
def test_the_allowance_is_a_fixed_amount_or_a_share(start: float, end: float, over: float) -> None:
    assert Growth(start, end, 0).over_allowed == pytest.approx(over)


def test_growth_of_a_process_is_measured() -> None:
    me = psutil.Process()
    name = f"{me.name()} {os.getpid()}"
    before = measure([me])
    taken = np.ones(64 * 2**20, np.uint8)
    after = measure([me])
    assert after[name] - before[name] == pytest.approx(64, abs=8)
    assert after.keys() == {name, SHARED}
    assert taken.sum()


def test_ended_processes_are_left_out() -> None:
    child = psutil.Popen(["true"])
    child.wait()
    assert measure([child]) == {SHARED: 0}


def test_objects_are_those_in_shared_memory() -> None:
    page = """# TYPE ray_object_store_memory gauge
ray_object_store_memory{Location="MMAP_SHM",ObjectState="SEALED"} 3145728.0
ray_object_store_memory{Location="MMAP_SHM",ObjectState="UNSEALED"} 1048576.0
ray_object_store_memory{Location="WORKER_HEAP",ObjectState=""} 40726.0
ray_object_store_available_memory{Component="raylet"} 1.073472584e+09
"""
    assert stored(Page.parse(page, 0.0)) == {OBJECTS: 4.0}


def test_touched_pages_of_the_store_are_not_judged() -> None:
    grown = {SHARED: Growth(200, 300, 0), OBJECTS: Growth(10, 15, 0), "a 1": Growth(100, 101, 0)}
    assert worst(grown) == OBJECTS
