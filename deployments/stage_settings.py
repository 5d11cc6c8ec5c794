"""What can be set about each stage: replicas, resources, devices, caches, the engine; checked before anything starts.

Knows names and bounds, and neither Ray nor torch. Which stages an application has is settings.py's.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava_core.engine.config import EngineConfig
from llava_core.types import Quantization


class Settings(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageArgs(Settings):
    """Replicas of one stage. They autoscale between the two bounds; equal bounds are a fixed number.

    `max_ongoing_requests` is per replica, `max_queued_requests` per gateway replica: beyond both, requests are refused
    with 429. The generator's engine has a limit of its own, max_running and max_waiting together, which has to be the
    lower one. Replicas run on nodes with all of `node_labels`.
    """

    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    node_labels: dict[str, str] = {}
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=2, gt=0)
    max_ongoing_requests: int = Field(default=16, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class GatewayArgs(StageArgs):
    """The stage that speaks HTTP. It holds connections and computes nothing."""

    target_ongoing_requests: float = Field(default=200, gt=0)
    max_ongoing_requests: int = Field(default=1000, ge=1)


class PreprocessorArgs(StageArgs):
    """The stage that decodes pictures. It keeps up to `cache_bytes` of tiles of pictures it has seen; 0 keeps none."""

    num_cpus: float = Field(default=0.2, ge=0)
    max_ongoing_requests: int = Field(default=4, ge=1)
    cache_bytes: int = Field(default=256 * 1024 * 1024, ge=0)


class ComputeArgs(StageArgs):
    """A stage that runs a network. `device` auto is the GPU where the replica has one; `threads` None is every core."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(default=None, ge=1)


class VisionEncoderArgs(ComputeArgs):
    """The stage with the tower. It keeps up to `cache_bytes` of features of pictures it has seen; 0 keeps none."""

    num_cpus: float = Field(default=0.3, ge=0)
    cache_bytes: int = Field(default=512 * 1024 * 1024, ge=0)


class GeneratorArgs(ComputeArgs):
    """The stage with the decoder, whose linear layers `quantization` stores in fewer bits."""

    num_cpus: float = Field(default=0.4, ge=0)
    target_ongoing_requests: float = Field(default=24, gt=0)
    max_ongoing_requests: int = Field(default=1000, ge=1)
    quantization: Quantization | None = None


class EngineArgs(Settings):
    """Of each generator replica: how many answers are written at once, how many more may wait before it says 429, and
    the rest of llava_core.engine.config.EngineConfig.

    `chunk_gap_ms` is the least time between two chunks of one answer, times the requests it holds, 200 ms at most: each
    chunk takes its share of that as processor time, so a busy replica sends fewer and larger ones.
    """

    max_running: int = Field(default=32, ge=1)
    max_waiting: int = Field(default=256, ge=0)
    max_step_tokens: int | None = None
    prefill_chunk: int | None = None
    cache_tokens: int | None = None
    block_size: int | None = None
    decode_graphs: bool = True
    chunk_gap_ms: float = Field(default=6.0, ge=0)

    @property
    def config(self) -> EngineConfig:
        """What the engine takes. Raises ValueError for limits that exclude each other."""
        return EngineConfig(**self.model_dump(exclude={"chunk_gap_ms"}))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.config
        return self
