"""The engine's statistics: the steps that computed something, and the current state."""

from collections.abc import Callable
from dataclasses import replace

from llava_core.engine.engine import Engine
from tests.llava_core.engine.conftest import make_request

BuildEngine = Callable[..., Engine]


def test_scheduled_requests_are_counted_in_every_step(build_engine: BuildEngine) -> None:
    engine, sizes = build_engine(), []
    for name in ("a", "b"):
        engine.add_request(replace(make_request("r"), request_id=name))
    while engine.has_work:
        engine.step()
        sizes.append(engine.stats.batch_size)
    assert max(sizes) == 2
    assert engine.stats.scheduled_requests == sum(sizes)
    assert engine.stats.num_steps == len(sizes)


def test_unread_prompt_tokens_are_known_after_each_step(build_engine: BuildEngine) -> None:
    engine = build_engine()
    for name in ("a", "b"):
        engine.add_request(replace(make_request("r"), request_id=name))
    engine.step()
    assert engine.stats.num_unread == engine._scheduler.num_unread
    while engine.has_work:
        engine.step()
    assert engine.stats.num_unread == 0


def test_an_empty_step_is_not_counted_but_freed_blocks_are(build_engine: BuildEngine) -> None:
    engine = build_engine()
    engine.add_request(make_request("a"))
    engine.step()
    before = replace(engine.stats)
    assert (before.num_steps, before.batch_size, before.num_running) == (1, 1, 1)
    assert before.used_blocks > 0
    engine.abort("a")
    assert engine.step() == []
    after = engine.stats
    assert (after.num_running, after.used_blocks) == (0, 0)
    assert (after.num_steps, after.step_seconds, after.batch_size) == (1, before.step_seconds, 1)
