"""What can be set about each stage: replicas, resources, devices, caches, the engine; checked before anything starts.

Knows names and bounds, and neither Ray nor torch. Which stages an application has is settings.py's.
"""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava_core.engine.config import EngineConfig
from llava_core.stages.loading import Compute
from llava_core.types import Quantization

_TARGET = "target_"
# A value, one of several, or none of these, as Ray writes it: `a`, `!a`, `in(a, b)`, `!in(a, b)`.
_VALUE = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelCondition = Annotated[str, Field(pattern=rf"^!?({_VALUE}|in\({_VALUE}(, ?{_VALUE})*\))$")]


class Settings(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScalingArgs(Settings):
    """When a stage gets more replicas or fewer; docs/scaling.md explains all of it.

    Each `target_*` of a stage is a signal: what one replica may have of it, None where it is not to count. Signals are
    means of `look_back_s`. What they ask for must last for a delay, and a number that is no more than `tolerance` too
    large stays.
    """

    look_back_s: float = Field(default=10, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    downscale_to_zero_delay_s: float = Field(default=600, ge=0)
    tolerance: float = Field(default=0.1, ge=0)

    @property
    def targets(self) -> dict[str, float]:
        """By the signals' names."""
        fields = {name: value for name, value in self if name.startswith(_TARGET)}
        return {name.removeprefix(_TARGET): float(value) for name, value in fields.items() if value is not None}

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if not self.targets:
            raise ValueError("every target is null, so that nothing would tell how many replicas are needed; set one")
        return self


class RequestScaling(ScalingArgs):
    """By requests, those that wait in gateways included."""

    target_requests: float = Field(default=2, gt=0)


class GatewayScaling(RequestScaling):
    """The same, of connections."""

    target_requests: float = Field(default=200, gt=0)


class EncoderScaling(ScalingArgs):
    """By tiles that wait for the tower, and by the share of time for which it works."""

    target_queued_tiles: float | None = Field(default=32, gt=0)
    target_busy: float | None = Field(default=0.8, gt=0, le=1)


class GeneratorScaling(ScalingArgs):
    """By tokens of prompts that wait to be read, by the share of the blocks of keys and values that requests hold, and
    by answers that are written or wait, as a share of the engine's max_running."""

    target_queued_prefill_tokens: float | None = Field(default=8192, gt=0)
    target_kv_cache_use: float | None = Field(default=0.8, gt=0, le=1)
    target_slot_use: float | None = Field(default=0.75, gt=0)


class PlacementArgs(Settings):
    """What a replica needs of its node beside CPUs and GPUs: `resources` by the names that nodes give theirs, a GPU of
    the `accelerator_type`, labels. `max_replicas_per_node` None is as many as fit."""

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
    """Replicas of one stage. They autoscale between the two bounds; equal bounds are a fixed number. A stage begins
    with `initial_replicas`, None being the lower bound, or one where that is 0: so whatever keeps it from running is
    known at the start.

    `max_ongoing_requests` is per replica, `max_queued_requests` per gateway replica: beyond both, requests are refused
    with 429. The generator's engine has a limit of its own, max_running and max_waiting together, which has to be the
    lower one.
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
        """How many there are at the start."""
        return max(1, self.min_replicas) if self.initial_replicas is None else self.initial_replicas


class GatewayArgs(StageArgs):
    """The stage that speaks HTTP. It holds connections and computes nothing. There is always one, because somebody has
    to be there for the first request."""

    min_replicas: int = Field(default=1, ge=1)
    autoscaling: GatewayScaling = GatewayScaling()
    max_ongoing_requests: int = Field(default=1000, ge=1)


class PreprocessorArgs(StageArgs):
    """The stage that decodes pictures. It keeps up to `cache_bytes` of tiles of pictures it has seen; 0 keeps none."""

    num_cpus: float = Field(default=0.2, ge=0)
    autoscaling: RequestScaling = RequestScaling()
    max_ongoing_requests: int = Field(default=4, ge=1)
    cache_bytes: int = Field(default=256 * 1024 * 1024, ge=0)


class ComputeArgs(StageArgs):
    """A stage that runs a network. `device` auto is the GPU where the replica has one; `threads` None is every core."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(default=None, ge=1)

    @property
    def compute(self) -> Compute:
        """What a process of the stage sets up."""
        return Compute(self.device, self.dtype, self.threads)


class VisionEncoderArgs(ComputeArgs):
    """The stage with the tower. It keeps up to `cache_bytes` of features of pictures it has seen; 0 keeps none."""

    num_cpus: float = Field(default=0.3, ge=0)
    autoscaling: EncoderScaling = EncoderScaling()
    cache_bytes: int = Field(default=512 * 1024 * 1024, ge=0)


class GeneratorArgs(ComputeArgs):
    """The stage with the decoder, whose linear layers `quantization` stores in fewer bits."""

    num_cpus: float = Field(default=0.4, ge=0)
    autoscaling: GeneratorScaling = GeneratorScaling()
    max_ongoing_requests: int = Field(default=1000, ge=1)
    quantization: Quantization | None = None

    @property
    def compute(self) -> Compute:
        """What a process of the stage sets up."""
        return replace(super().compute, quantization=self.quantization)


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
