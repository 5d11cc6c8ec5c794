"""The engine's settings: impossible values are refused."""

from typing import Any

import pytest

from llava_core.engine.config import EngineConfig, StepLimits


def test_the_defaults_are_sound() -> None:
    config = EngineConfig()
    for device in ("cpu", "cuda"):
        limits = config.step_limits(device)
        assert limits.max_tokens >= config.max_running + limits.prefill_chunk
    assert config.block_size is None
    assert config.cache_tokens is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"max_waiting": -1}, "max_waiting at least 0"),
        ({"prefill_chunk": 0}, "max_step_tokens must have room"),
        ({"max_running": 9, "prefill_chunk": 8, "max_step_tokens": 16}, "max_step_tokens must have room"),
        ({"block_size": 0}, "block_size and cache_tokens must be at least 1"),
        ({"cache_tokens": 0}, "block_size and cache_tokens must be at least 1"),
    ],
)
def test_impossible_limits_are_refused_with_all_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*EngineConfig\(max_running="):
        EngineConfig(**options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_step_tokens": 700, "prefill_chunk": 300}, StepLimits(700, 300)),
        # The limit that is not set is derived from the other.
        ({"prefill_chunk": 5000}, StepLimits(5032, 5000)),
        ({"max_step_tokens": 40}, StepLimits(40, 8)),
    ],
)
def test_step_limits_follow_the_settings(device: str, options: dict[str, Any], expected: StepLimits) -> None:
    assert EngineConfig(**options).step_limits(device) == expected


def test_a_gpu_prefills_more_per_step() -> None:
    assert EngineConfig().step_limits("cpu") == StepLimits(1024, 128)
    assert EngineConfig().step_limits("cuda") == StepLimits(4096, 512)


def test_the_smallest_limits_are_accepted() -> None:
    config = EngineConfig(
        max_running=1, max_waiting=0, max_step_tokens=2, prefill_chunk=1, block_size=1, cache_tokens=1
    )
    assert config.step_limits("cpu") == StepLimits(2, 1)
