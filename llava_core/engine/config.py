"""The engine's settings. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens in a step, and prompt tokens beside answers. Up to some 300 tokens, a GPU needs no longer than to read the
# weights.
_STEPS = {"cpu": (1024, 128), "cuda": (4096, 512)}


@dataclass(frozen=True)
class StepLimits:
    """How many tokens a step may run through the model, and how many prompt tokens while answers are being decoded."""

    max_tokens: int
    prefill_chunk: int


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine takes on at once.

    `max_running` requests advance in every step, `max_waiting` more may queue; the next is refused. A step runs at most
    `max_step_tokens` tokens through the model, and at most `prefill_chunk` prompt tokens while answers are being
    decoded, which bounds how long a new prompt delays them. None: the device's default, see `step_limits`. The cache
    holds `cache_tokens` tokens (None: as many as are useful and fit into the available memory) in blocks of
    `block_size` (None: the device's default). With `decode_graphs`, pure decode steps are recorded at startup, on
    devices where that makes them faster.
    """

    max_running: int = 32
    max_waiting: int = 256
    max_step_tokens: int | None = None
    prefill_chunk: int | None = None
    block_size: int | None = None
    cache_tokens: int | None = None
    decode_graphs: bool = True

    @property
    def max_requests(self) -> int:
        """Running and waiting requests together."""
        return self.max_running + self.max_waiting

    def step_limits(self, device: str) -> StepLimits:
        """The limits of a step on a device of type "cpu" or "cuda". Unset limits are fitted to those that are set."""
        most, chunk = _STEPS[device]
        if self.prefill_chunk is not None:
            chunk = self.prefill_chunk
        elif self.max_step_tokens is not None:
            chunk = min(chunk, self.max_step_tokens - self.max_running)
        return StepLimits(self.max_step_tokens or max(most, self.max_running + chunk), chunk)

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_waiting < 0:
            raise ValueError(f"max_running must be at least 1 and max_waiting at least 0: {self}")
        chunk = 1 if self.prefill_chunk is None else self.prefill_chunk
        if chunk < 1 or (self.max_step_tokens is not None and self.max_step_tokens < self.max_running + chunk):
            raise ValueError(
                f"max_step_tokens must have room for a token of each of max_running and for prefill_chunk: {self}"
            )
        if any(value is not None and value < 1 for value in (self.block_size, self.cache_tokens)):
            raise ValueError(f"block_size and cache_tokens must be at least 1: {self}")
