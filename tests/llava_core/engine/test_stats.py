"""The engine's counters begin at nothing."""

from dataclasses import asdict

from llava_core.engine.stats import EngineStats


def test_an_engine_that_did_nothing_has_counted_nothing() -> None:
    counted = asdict(EngineStats(num_blocks=7))
    assert counted.pop("num_blocks") == 7
    assert set(counted.values()) == {0}
