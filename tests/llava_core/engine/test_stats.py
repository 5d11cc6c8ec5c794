"""What the engine counts about itself: the steps that ran anything, and how things stand."""

from collections.abc import Callable
from dataclasses import replace

from llava_core.engine.engine import Engine
from tests.llava_core.engine.conftest import make_request

BuildEngine = Callable[..., Engine]


def test_what_steps_hold_is_counted_request_by_request(build_engine: BuildEngine) -> None:
    engine, sizes = build_engine(), []
    for name in ("a", "b"):
        engine.add_request(replace(make_request("r"), request_id=name))
    while engine.has_work:
        engine.step()
        sizes.append(engine.stats.batch_size)
    assert max(sizes) == 2
    assert engine.stats.scheduled_requests == sum(sizes)
    assert engine.stats.num_steps == len(sizes)


def test_tokens_of_prompts_that_are_to_be_read_are_known_after_each_step(build_engine: BuildEngine) -> None:
    engine = build_engine()
    for name in ("a", "b"):
        engine.add_request(replace(make_request("r"), request_id=name))
    engine.step()
    assert engine.stats.num_unread == engine._scheduler.num_unread
    while engine.has_work:
        engine.step()
    assert engine.stats.num_unread == 0


def test_a_step_that_had_nothing_to_run_is_none_but_what_was_given_back_is_seen(build_engine: BuildEngine) -> None:
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
