"""Stages: what one setting leaves of the others, and what the engine is told."""

import pytest
from pydantic import ValidationError

from deployments.settings import AppArgs
from deployments.stage_settings import EngineArgs, StageArgs
from llava_core.engine.config import EngineConfig


@pytest.mark.parametrize("stage", ["gateway", "preprocessor", "vision_encoder", "generator"])
def test_what_is_not_said_about_a_stage_stays_as_it_is(stage: str) -> None:
    changed = getattr(AppArgs.model_validate({stage: {"num_cpus": 0.7}}), stage)
    assert changed.num_cpus == 0.7
    assert changed.model_dump(exclude={"num_cpus"}) == getattr(AppArgs(), stage).model_dump(exclude={"num_cpus"})


def test_the_bounds_of_replicas_do_not_cross() -> None:
    with pytest.raises(ValidationError, match="max_replicas 2 is below min_replicas 3"):
        StageArgs(min_replicas=3, max_replicas=2)


def test_the_engine_is_told_all_but_how_its_answers_travel() -> None:
    args = EngineArgs(max_running=3, cache_tokens=100, chunk_gap_ms=50)
    assert args.config == EngineConfig(max_running=3, max_waiting=256, cache_tokens=100)
    with pytest.raises(ValidationError, match="prefill_chunk"):
        EngineArgs(max_step_tokens=8, prefill_chunk=16)
