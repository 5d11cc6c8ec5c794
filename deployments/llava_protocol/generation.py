"""`POST /worker_generate_stream`: a body becomes a RenderedRequest, or the body forwarded to an external worker.

As lenient as the reference: numbers may be strings; unknown fields are ignored and forwarded. Knows nothing about HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field

from deployments.openai_api.sampling_schema import WHOLE_BOUND, Stop, read_stops
from deployments.openai_api.schema import Body, parse_body
from llava_core.images.loading import decode_base64
from llava_core.request_limits import RequestLimits, check_rendered
from llava_core.types import ImagePart, RenderedRequest, SamplingParams

# As in the reference.
_DEFAULT_TOKENS, _MOST_TOKENS = 256, 1024
_SAMPLES_ABOVE = 0.001
# The reference's workers fail without a stop string; this one does not occur in their answers.
_NO_STOP = "</s>"


class GenerationBody(Body):
    """The body of a request."""

    model_config = ConfigDict(strict=False, extra="allow", allow_inf_nan=False)

    model: str | None = None
    prompt: str
    images: list[str] | None = None
    temperature: float | None = Field(default=None, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    max_new_tokens: int | None = Field(default=None, gt=-WHOLE_BOUND, lt=WHOLE_BOUND)
    stop: Stop | None = None


@dataclass(frozen=True)
class Echo:
    """The prompt that every frame begins with, and the endings that are trimmed from the answer so far. Outlives the
    request, which holds the pictures."""

    prompt: str = field(repr=False)
    trims: tuple[str, ...] = ()

    def text(self, answer: str) -> str:
        """Return the text of a frame."""
        for trim in self.trims:
            answer = answer.removesuffix(trim)
        return self.prompt + answer


@dataclass(frozen=True)
class LegacyRequest:
    """The request in two forms: `generation` for one of our models, None where it asks for no tokens; `forwarded` for
    an external worker."""

    model: str | None
    echo: Echo
    generation: RenderedRequest | None
    forwarded: Mapping[str, Any] = field(repr=False)


def read_generation(body: bytes, request_id: str, limits: RequestLimits) -> LegacyRequest:
    """Parse and check a body. Raises RequestError naming field and cause. `request_id` must be unique, so it cannot be
    the client's own."""
    parsed = parse_body(body, GenerationBody, max_text=limits.max_text)
    images = [_without_head(image) for image in parsed.images or ()]
    # Checked before anything is decoded.
    check_rendered(parsed.prompt, len(images), limits)
    parts = tuple(
        ImagePart(decode_base64(image, limits.image, f"images[{index}]")) for index, image in enumerate(images)
    )
    given = [stop for stop in ([parsed.stop] if isinstance(parsed.stop, str) else parsed.stop or ()) if stop]
    max_tokens = _DEFAULT_TOKENS if parsed.max_new_tokens is None else min(parsed.max_new_tokens, _MOST_TOKENS)
    generation = None
    if max_tokens >= 1:
        # `test_message` sends a space, which would end every answer after its first word.
        ends = [stop for stop in given if not stop.isspace()]
        generation = RenderedRequest(request_id, parsed.prompt, parts, _sampling(parsed, max_tokens, ends))
    forwarded = parsed.model_dump(exclude_unset=True) | {"images": images, "stop": given[0] if given else _NO_STOP}
    echo = Echo(parsed.prompt, tuple(filter(str.isspace, given)))
    return LegacyRequest(parsed.model, echo, generation, forwarded)


def _sampling(parsed: GenerationBody, max_tokens: int, stops: list[str]) -> SamplingParams:
    temperature = 1.0 if parsed.temperature is None else parsed.temperature
    top_p = 1.0 if parsed.top_p is None else parsed.top_p
    # A nucleus of no probability mass leaves only the likeliest token.
    if temperature <= _SAMPLES_ABOVE or top_p == 0:
        temperature, top_p = 0.0, 1.0
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=read_stops(stops))


def _without_head(image: str) -> str:
    """Reduce a data URL to its data, which is all that the reference's workers understand. Base64 may be wrapped."""
    data = image.partition(",")[2] if image[:5].lower() == "data:" else image
    return "".join(data.split())
