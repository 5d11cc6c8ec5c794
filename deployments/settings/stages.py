"""Settings of each stage: replicas, resources, devices, caches, the engine; validated before anything starts.

Knows names and bounds, but neither Ray nor torch. app.py says which stages an application has.
"""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava_core.engine.config import EngineConfig
from llava_core.stages.loading import Compute
from llava_core.types import Quantization

_TARGET = "target_"
# A value, a set of values, or the negation of either, in Ray's syntax: `a`, `!a`, `in(a, b)`, `!in(a, b)`.
_VALUE = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelCondition = Annotated[str, Field(pattern=rf"^!?({_VALUE}|in\({_VALUE}(, ?{_VALUE})*\))$")]


class Settings(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScalingArgs(Settings):
    """When a stage gets more or fewer replicas; docs/scaling.md has the details.

    Each `target_*` of a stage is a signal's target: how much of it one replica may have; None ignores the signal.
    Signals are averaged over `look_back_s`. The number of replicas changes only after the signals have asked for it
    throughout a delay, and a number that is no more than `tolerance` too large is kept.
    """

    look_back_s: float = Field(default=10, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    downscale_to_zero_delay_s: float = Field(default=600, ge=0)
    tolerance: float = Field(default=0.1, ge=0)

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are set, by signal name."""
        fields = {name: value for name, value in self if name.startswith(_TARGET)}
        return {name.removeprefix(_TARGET): float(value) for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if not self.targets:
            raise ValueError("every target is null, so nothing determines how many replicas are needed; set one")
        return self


class RequestScaling(ScalingArgs):
    """Scales by requests, including those queued in gateways."""

    target_requests: float = Field(default=2, gt=0)


class GatewayScaling(RequestScaling):
    """Scales by requests, each of which is an open connection."""

    target_requests: float = Field(default=200, gt=0)


class EncoderScaling(ScalingArgs):
    """Scales by tiles queued for the tower, and by the share of time for which the tower is busy."""

    target_queued_tiles: float | None = Field(default=32, gt=0)
    target_busy: float | None = Field(default=0.8, gt=0, le=1)


class GeneratorScaling(ScalingArgs):
    """Scales by prompt tokens waiting for prefill, by the share of the KV cache blocks that requests hold, and by
    running and waiting answers as a share of the engine's max_running."""

    target_queued_prefill_tokens: float | None = Field(default=8192, gt=0)
    target_kv_cache_use: float | None = Field(default=0.8, gt=0, le=1)
    target_slot_use: float | None = Field(default=0.75, gt=0)


class PlacementArgs(Settings):
    """What a replica requires of its node besides CPUs and GPUs: custom `resources` by name, a GPU of
    `accelerator_type`, labels. `max_replicas_per_node` None allows as many as fit."""

    accelerator_type: str | None = Field(default=None, min_length=1)
    label_selector: dict[str, LabelCondition] = {}
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)

    @model_validator(mode="after")
    def _check_resources(self) -> Self:
        for name, setting in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            if name in self.resources:
                raise ValueError(f"resources names {name}, which {setting} is for")
        return self


class StageArgs(PlacementArgs):
    """Replicas of one stage. Their number scales between the two bounds; equal bounds fix it. A stage starts with
    `initial_replicas`; None means the lower bound, or one replica where that is 0, so that whatever keeps a replica
    from running is found at startup.

    `max_ongoing_requests` is per replica, `max_queued_requests` per gateway replica: requests beyond both are refused
    with 429. The generator's engine has its own limit, max_running plus max_waiting, which must be the lower one.
    """

    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    initial_replicas: int | None = Field(default=None, ge=0)
    autoscaling: ScalingArgs = RequestScaling()
    max_ongoing_requests: int = Field(default=16, ge=1)
    max_queued_requests: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if not self.min_replicas <= self.first_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas {self.initial_replicas} is not between min_replicas {self.min_replicas} and "
                f"max_replicas {self.max_replicas}"
            )
        return self

    @property
    def first_replicas(self) -> int:
        """How many replicas the stage starts with."""
        return max(1, self.min_replicas) if self.initial_replicas is None else self.initial_replicas


class GatewayArgs(StageArgs):
    """The stage that speaks HTTP. It holds connections and computes nothing. At least one replica always runs, because
    something has to accept the first request."""

    min_replicas: int = Field(default=1, ge=1)
    autoscaling: GatewayScaling = GatewayScaling()
    max_ongoing_requests: int = Field(default=1000, ge=1)


class PreprocessorArgs(StageArgs):
    """The stage that decodes pictures. It caches the tiles of recent pictures, up to `cache_bytes`; 0 caches none."""

    num_cpus: float = Field(default=0.2, ge=0)
    autoscaling: RequestScaling = RequestScaling()
    max_ongoing_requests: int = Field(default=4, ge=1)
    cache_bytes: int = Field(default=256 * 1024 * 1024, ge=0)


class ComputeArgs(StageArgs):
    """A stage that runs a network. `device` auto is the GPU if the replica has one; `threads` None uses every core."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(default=None, ge=1)

    @property
    def compute(self) -> Compute:
        """The compute settings that a process of the stage sets up."""
        return Compute(self.device, self.dtype, self.threads)


class VisionEncoderArgs(ComputeArgs):
    """The stage with the tower. It caches the features of recent pictures, up to `cache_bytes`; 0 caches none."""

    num_cpus: float = Field(default=0.3, ge=0)
    autoscaling: EncoderScaling = EncoderScaling()
    cache_bytes: int = Field(default=512 * 1024 * 1024, ge=0)


class GeneratorArgs(ComputeArgs):
    """The stage with the decoder. `quantization` stores its linear layers in fewer bits."""

    num_cpus: float = Field(default=0.4, ge=0)
    autoscaling: GeneratorScaling = GeneratorScaling()
    max_ongoing_requests: int = Field(default=1000, ge=1)
    quantization: Quantization | None = None

    @property
    def compute(self) -> Compute:
        """The compute settings that a process of the stage sets up."""
        return replace(super().compute, quantization=self.quantization)


class EngineArgs(Settings):
    """Per generator replica: how many answers are generated at once, how many more may wait before requests are refused
    with 429, and the rest of llava_core.engine.config.EngineConfig.

    The least time between two chunks of one answer is `chunk_gap_ms` times the number of requests the engine holds, at
    most 200 ms: every chunk costs processor time, so a busy replica sends fewer, larger ones.
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
        """The engine's own configuration. Raises ValueError for limits that exclude each other."""
        return EngineConfig(**self.model_dump(exclude={"chunk_gap_ms"}))

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.config
        return self
