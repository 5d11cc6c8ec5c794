"""Settings of stages: one leaves the others unchanged, bounds are checked, and the engine receives its own."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.settings.app import AppArgs
from deployments.settings.stages import EncoderScaling, EngineArgs, GeneratorArgs, StageArgs, VisionEncoderArgs
from llava_core.engine.config import EngineConfig


@pytest.mark.parametrize("stage", ["gateway", "preprocessor", "vision_encoder", "generator"])
def test_unset_fields_of_a_stage_keep_their_defaults(stage: str) -> None:
    changed = getattr(AppArgs.model_validate({stage: {"num_cpus": 0.7}}), stage)
    assert changed.num_cpus == 0.7
    assert changed.model_dump(exclude={"num_cpus"}) == getattr(AppArgs(), stage).model_dump(exclude={"num_cpus"})


def test_max_replicas_must_not_be_below_min_replicas() -> None:
    with pytest.raises(ValidationError, match="max_replicas 2 is below min_replicas 3"):
        StageArgs(min_replicas=3, max_replicas=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gateway": {"min_replicas": 0}}, r"gateway\.min_replicas\n.*greater than or equal to 1"),
        (
            {"generator": {"min_replicas": 2, "max_replicas": 3, "initial_replicas": 1}},
            "initial_replicas 1 is not betw",
        ),
        ({"generator": {"min_replicas": 0, "initial_replicas": 2}}, "initial_replicas 2 is not between min_replicas 0"),
        (
            {"vision_encoder": {"autoscaling": {"target_queued_tiles": None, "target_busy": None}}},
            "every target is null",
        ),
        ({"vision_encoder": {"autoscaling": {"target_busy": 1.1}}}, "less than or equal to 1"),
        ({"vision_encoder": {"autoscaling": {"target_requests": 2}}}, "Extra inputs are not permitted"),
        ({"generator": {"autoscaling": {"target_slot_use": 0}}}, "greater than 0"),
        ({"generator": {"resources": {"GPU": 1}}}, "resources names GPU, which num_gpus is for"),
        ({"generator": {"resources": {"tpu": 0}}}, "greater than 0"),
        ({"generator": {"label_selector": {"zone": "in()"}}}, "match pattern"),
        ({"generator": {"label_selector": {"zone": "a, b"}}}, "match pattern"),
        ({"generator": {"max_replicas_per_node": 0}}, "greater than or equal to 1"),
    ],
)
def test_invalid_stage_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AppArgs.model_validate(settings)


def test_signals_without_a_target_do_not_count() -> None:
    assert VisionEncoderArgs().autoscaling.targets == {"queued_tiles": 32, "busy": 0.8}
    assert EncoderScaling(target_busy=None).targets == {"queued_tiles": 32}
    signals = {"queued_prefill_tokens": 8192, "kv_cache_use": 0.8, "slot_use": 0.75}
    assert GeneratorArgs().autoscaling.targets == signals


def test_engine_settings_become_the_engines_config() -> None:
    args = EngineArgs(max_running=3, cache_tokens=100, chunk_gap_ms=50)
    assert args.config == EngineConfig(max_running=3, max_waiting=256, cache_tokens=100)
    with pytest.raises(ValidationError, match="prefill_chunk"):
        EngineArgs(max_step_tokens=8, prefill_chunk=16)
