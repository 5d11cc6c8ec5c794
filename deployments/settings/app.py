"""Settings of the service: the `args` of serve_config.yaml, validated before anything starts.

Unknown keys are errors. Knows names and bounds, but neither Ray nor torch. Serve's own `deployments:` section can also
override how many replicas, CPUs and GPUs a stage gets.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from deployments.settings.hosts import HostArgs
from deployments.settings.llava_protocol import LlavaProtocolArgs
from deployments.settings.models import ModelArgs, with_defaults
from deployments.settings.stages import (
    EngineArgs,
    GatewayArgs,
    GeneratorArgs,
    PreprocessorArgs,
    Settings,
    VisionEncoderArgs,
)
from deployments.settings.upstreams import UpstreamArgs
from llava_core.images.loading import ImageLimits
from llava_core.request_limits import RequestLimits


class LimitArgs(Settings):
    """Limits of one request; anything beyond them is refused with a message that names the limit.

    `max_body_seconds` bounds the arrival of the whole body, `max_timeout_seconds` the timeout that a client may set for
    itself. A stream that has been idle for `heartbeat_seconds` sends a heartbeat. Content that has killed two replicas
    is refused for `refused_seconds`. Two limits are per gateway replica: `max_bytes_in_flight` bounds the bodies it
    holds before they are sent on, `max_requests_in_flight` the requests (None: AppArgs.max_requests_in_flight).
    """

    max_body_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    max_body_seconds: float = Field(default=60, gt=0)
    max_timeout_seconds: float = Field(default=3600, gt=0)
    heartbeat_seconds: float = Field(default=15, gt=0)
    refused_seconds: float = Field(default=600, gt=0)
    max_bytes_in_flight: int = Field(default=512 * 1024 * 1024, ge=1)
    max_requests_in_flight: int | None = Field(default=None, ge=1)
    max_images: int = Field(default=RequestLimits.max_images, ge=0)
    max_image_bytes: int = Field(default=ImageLimits.max_bytes, ge=1)
    max_image_pixels: int = Field(default=ImageLimits.max_pixels, ge=1)
    max_image_side: int = Field(default=ImageLimits.max_side, ge=1)
    max_text: int = Field(default=RequestLimits.max_text, ge=1)
    max_n: int = Field(default=RequestLimits.max_n, ge=1)

    @model_validator(mode="after")
    def _check_bytes(self) -> Self:
        if self.max_bytes_in_flight < self.max_body_bytes:
            raise ValueError(
                f"max_bytes_in_flight {self.max_bytes_in_flight} is below max_body_bytes {self.max_body_bytes}"
            )
        return self

    @property
    def image(self) -> ImageLimits:
        """The limits of one picture."""
        return ImageLimits(
            max_bytes=self.max_image_bytes, max_pixels=self.max_image_pixels, max_side=self.max_image_side
        )

    @property
    def request(self) -> RequestLimits:
        """The limits of one parsed request."""
        return RequestLimits(max_images=self.max_images, max_text=self.max_text, max_n=self.max_n, image=self.image)


class AuthArgs(Settings):
    """Authentication. With `keys_file` None requests need no key, and the service listens on the loopback interface
    only, unless `allow_anyone` states that something in front of it keeps strangers out."""

    keys_file: str | None = None
    allow_anyone: bool = False

    @field_validator("keys_file")
    @classmethod
    def _locate(cls, keys_file: str | None) -> str | None:
        # Replicas run in another working directory.
        return None if keys_file is None else str(Path(keys_file).expanduser().resolve())


class CorsArgs(Settings):
    """Browser pages from `origins` may call the service: by default none; `*` allows every origin."""

    origins: tuple[str, ...] = ()


class FetchArgs(HostArgs):
    """Pictures given by http(s) address. `max_bytes` and `timeout_s` are per picture, redirects included."""

    max_bytes: int = Field(default=20 * 1024 * 1024, ge=1)
    timeout_s: float = Field(default=10, gt=0)
    max_redirects: int = Field(default=3, ge=0)


class AppArgs(Settings):
    """The whole service. `models` are served side by side; `engine`, `vision_encoder` and `generator` apply to each of
    them, except for what its own entry overrides. With `offline` no replica downloads anything from the hub.
    """

    offline: bool = False
    auth: AuthArgs = AuthArgs()
    cors: CorsArgs = CorsArgs()
    fetch: FetchArgs = FetchArgs()
    limits: LimitArgs = LimitArgs()
    llava_protocol: LlavaProtocolArgs = LlavaProtocolArgs()
    engine: EngineArgs = EngineArgs()
    gateway: GatewayArgs = GatewayArgs()
    preprocessor: PreprocessorArgs = PreprocessorArgs()
    vision_encoder: VisionEncoderArgs = VisionEncoderArgs()
    generator: GeneratorArgs = GeneratorArgs()
    # Declared after the fields that complete its entries, so that a mistake in one of those is reported there.
    models: tuple[ModelArgs, ...] = Field(default=(ModelArgs(),), min_length=1)

    @property
    def own_models(self) -> tuple[ModelArgs, ...]:
        """The models whose weights this service loads itself."""
        return tuple(model for model in self.models if model.upstream is None)

    @property
    def upstreams(self) -> dict[str, UpstreamArgs]:
        """The servers that answer for the other models, by model name."""
        return {model.served_name: model.upstream for model in self.models if model.upstream is not None}

    @property
    def max_requests_in_flight(self) -> int:
        """Per gateway replica: the configured number, or else what the engines of all replicas at `max_replicas` and
        all upstreams can take together."""
        if self.limits.max_requests_in_flight is not None:
            return self.limits.max_requests_in_flight
        engines = sum(each.engine.config.max_requests * each.generator.max_replicas for each in self.own_models)
        return engines + sum(upstream.max_requests for upstream in self.upstreams.values())

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        return with_defaults(given)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [model.served_name for model in self.models]
        for name, count in Counter(names).items():
            if count > 1:
                raise ValueError(f"{count} models are called {name!r}; give each entry of models a name of its own")
        labels = Counter(model.label for model in self.own_models)
        alike = [model.served_name for model in self.own_models if labels[model.label] > 1]
        if alike:
            raise ValueError(
                f"{', '.join(map(repr, alike))} differ only in what cannot be part of a deployment's name, which has "
                "letters, digits, '.', '_' and '-'; rename one"
            )
        return self
