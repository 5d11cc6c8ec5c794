"""What can be set about the service: the `args` of serve_config.yaml, checked before anything starts.

Unknown keys are errors. Knows names and bounds, and neither Ray nor torch. How many replicas, CPUs and GPUs a stage
gets can also be overridden by Serve's own `deployments:` section.
"""

import ipaddress
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.addresses import HostRule
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.engine.config import EngineConfig
from llava_core.images.loading import ImageLimits
from llava_core.prepare import RequestLimits
from llava_core.types import Quantization

DEFAULT_MODEL_NAME = "scenes-llava"


class _Settings(BaseModel):
    # `model` is a word of this domain, not pydantic's.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StageArgs(_Settings):
    """Replicas of one stage. They autoscale between the two bounds; equal bounds are a fixed number.

    `max_ongoing_requests` is per replica, `max_queued_requests` per gateway replica: beyond both, requests are refused
    with 429. The generator's engine has a limit of its own, max_running and max_waiting together, which has to be the
    lower one.
    """

    num_cpus: float = Field(default=0.1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
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


class PreprocessorArgs(StageArgs):
    """The stage that decodes pictures. It keeps up to `cache_bytes` of tiles of pictures it has seen; 0 keeps none."""

    cache_bytes: int = Field(default=256 * 1024 * 1024, ge=0)


class ComputeArgs(StageArgs):
    """A stage that runs a network. `device` auto is the GPU where the replica has one; `threads` None is every core."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int | None = Field(default=None, ge=1)


class VisionEncoderArgs(ComputeArgs):
    """The stage with the tower. It keeps up to `cache_bytes` of features of pictures it has seen; 0 keeps none."""

    cache_bytes: int = Field(default=512 * 1024 * 1024, ge=0)


class GeneratorArgs(ComputeArgs):
    """The stage with the decoder, whose linear layers `quantization` stores in fewer bits."""

    quantization: Quantization | None = None


class EngineArgs(_Settings):
    """Of each generator replica: how many answers are written at once, how many more may wait before it says 429, and
    the rest of llava_core.engine.config.EngineConfig.

    `chunk_gap_ms` is the least time between two chunks of one answer, times the requests it holds, 200 ms at most: each
    chunk takes its share of that as processor time, so a busy replica sends fewer and larger ones.
    """

    max_running: int = Field(default=32, ge=1)
    max_waiting: int = Field(default=256, ge=0)
    max_step_tokens: int = EngineConfig.max_step_tokens
    prefill_chunk: int = EngineConfig.prefill_chunk
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


class LimitArgs(_Settings):
    """What one request may hold; more is refused with a message that names the limit.

    `max_body_seconds` is for the whole body to come, `max_timeout_seconds` what a client may set as its own limit. A
    stream that has nothing to say for `heartbeat_seconds` shows that it is still there. What has killed two replicas is
    refused for `refused_seconds`. `max_bytes_in_flight` is of each gateway replica: the bodies it
    holds at once, until they are sent on.
    """

    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    max_body_seconds: float = Field(default=60, gt=0)
    max_timeout_seconds: float = Field(default=3600, gt=0)
    heartbeat_seconds: float = Field(default=15, gt=0)
    refused_seconds: float = Field(default=600, gt=0)
    max_bytes_in_flight: int = Field(default=512 * 1024 * 1024, ge=1)
    max_images: int = Field(default=8, ge=0)
    max_image_bytes: int = Field(default=20 * 1024 * 1024, ge=1)
    max_image_pixels: int = Field(default=40_000_000, ge=1)
    max_image_side: int = Field(default=10_000, ge=1)
    max_text: int = Field(default=200_000, ge=1)
    max_n: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _check_bytes(self) -> Self:
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                f"max_bytes_in_flight {self.max_bytes_in_flight} is below max_body_bytes {self.max_body_bytes}"
            )
        return self

    @property
    def image(self) -> ImageLimits:
        """The bounds of one picture."""
        return ImageLimits(
            max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels, max_side=self.max_image_side
        )

    @property
    def request(self) -> RequestLimits:
        """The bounds of one request, once it has been parsed."""
        return RequestLimits(max_images=self.max_images, max_text=self.max_text, max_n=self.max_n, image=self.image)


class AuthArgs(_Settings):
    """Who may ask. `keys_file` None: nobody is asked who they are, and the service listens on the loopback interface
    alone unless `allow_anyone` says that something else in front of it keeps strangers out."""

    keys_file: str | None = None
    allow_anyone: bool = False

    @field_validator("keys_file")
    @classmethod
    def _locate(cls, keys_file: str | None) -> str | None:
        # Replicas work elsewhere.
        return None if keys_file is None else str(Path(keys_file).expanduser().resolve())


class CorsArgs(_Settings):
    """Pages of which `origins` may call the service from a browser: none, unless they are named; `*` is every one."""

    origins: tuple[str, ...] = ()


class FetchArgs(_Settings):
    """Pictures by http(s) address. Of no host, unless it is in `allowed_hosts`: `name`, `*.name` or `*`, with `:port`
    where it is not the scheme's own. Names must lead to public addresses or into `allowed_networks`.

    `max_bytes` is of each picture, `timeout_s` of each with all its redirects.
    """

    allowed_hosts: tuple[str, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    allow_http: bool = False
    max_bytes: int = Field(default=20 * 1024 * 1024, ge=1)
    timeout_s: float = Field(default=10, gt=0)
    max_redirects: int = Field(default=3, ge=0)

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            HostRule.parse(host)
        return hosts

    @field_validator("allowed_networks")
    @classmethod
    def _check_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks


class AppArgs(_Settings):
    """The whole service. `model` None is the default model; `base` is what an adapter or projector was trained on;
    `template` None is the one that the checkpoint's own chat template agrees with; `model_name` None is the folder's
    name or the hub id.

    `revisions` has the revision of every hub id that is used, those of base and tower among them; None is what is the
    newest of each when the application is built. With `offline` nothing is fetched, by no replica.
    """

    model: str | None = None
    base: str | None = None
    revisions: dict[str, str] | None = None
    offline: bool = False
    model_name: str | None = None
    template: str | None = None
    auth: AuthArgs = AuthArgs()
    cors: CorsArgs = CorsArgs()
    fetch: FetchArgs = FetchArgs()
    limits: LimitArgs = LimitArgs()
    engine: EngineArgs = EngineArgs()
    gateway: StageArgs = StageArgs(num_cpus=0.1, max_ongoing_requests=1000, target_ongoing_requests=200)
    preprocessor: PreprocessorArgs = PreprocessorArgs(num_cpus=0.2, max_ongoing_requests=4)
    vision_encoder: VisionEncoderArgs = VisionEncoderArgs(num_cpus=0.3)
    generator: GeneratorArgs = GeneratorArgs(num_cpus=0.4, max_ongoing_requests=1000, target_ongoing_requests=24)

    @property
    def checkpoint(self) -> str:
        """The folder, absolute because replicas work elsewhere, or the hub id."""
        return str(DEFAULT_MODEL) if self.model is None else _located(self.model)

    @property
    def base_checkpoint(self) -> str | None:
        """The same of the base."""
        return None if self.base is None else _located(self.base)

    @property
    def served_name(self) -> str:
        """What clients put into `model`."""
        if self.model_name is not None:
            return self.model_name
        folder = Path(self.checkpoint)
        if folder == DEFAULT_MODEL:
            return DEFAULT_MODEL_NAME
        return folder.name if folder.is_dir() else self.checkpoint


def _located(checkpoint: str) -> str:
    folder = Path(checkpoint).expanduser()
    return str(folder.resolve()) if folder.is_dir() else checkpoint
