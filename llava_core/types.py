"""The values passed between the project's components: small frozen dataclasses without behaviour of their own.

Imports only the standard library, so every process can afford it; array types appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from llava_core.views import DicomView, ImageTransform

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

Role = Literal["user", "assistant"]
FinishReason = Literal["stop", "length"]
# The decoder's linear layers in fewer bits: LLM.int8() or NF4.
Quantization = Literal["8bit", "4bit"]

# Alternatives listed beside a token's own log-probability; OpenAI's limit.
MAX_LOGPROBS = 20
# Below this temperature an answer is greedy: dividing logits by less could overflow to infinity, and the likeliest
# token is all but certain anyway.
GREEDY_BELOW = 1e-4

# Milliseconds by stage name: fetch, preprocess, encode, transfer, queue, prefill, decode.
StageTimes = dict[str, float]


class Size(NamedTuple):
    """Pixels, always width first, as in Pillow and LLaVA."""

    width: int
    height: int


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is sampled.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and the penalties' defaults are off. `max_tokens` None:
    no limit but the context. `seed` makes a sampled answer repeatable whatever else is in the batch. The answer ends
    before a string of `stop` and at a token of `stop_token_ids`; neither such a token nor the model's own end token is
    sampled before there are `min_tokens`. `logit_bias` has pairs of token id and added bias. `n` answers share one
    prefill of the prompt. `logprobs` None: none; else how many alternatives to list beside each token's own.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens):
            raise ValueError(f"min_tokens must not be negative nor above max_tokens, not {self.min_tokens}")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must lie between 0 and {MAX_LOGPROBS}, not {self.logprobs}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        self._check_shape()

    def _check_shape(self) -> None:
        """Check what shapes the distribution. The comparisons are written so that NaN is refused too."""
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must lie between 0 and 2, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and at most at 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 and 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be a number above 0, not {self.repetition_penalty}")
        for name, value in (("presence", self.presence_penalty), ("frequency", self.frequency_penalty)):
            if not -2 <= value <= 2:
                raise ValueError(f"{name}_penalty must lie between -2 and 2, not {value}")
        if any(not -100 <= bias <= 100 for _, bias in self.logit_bias):
            raise ValueError(f"logit_bias must lie between -100 and 100: {self.logit_bias}")


@dataclass(frozen=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A picture in a message as received: encoded bytes (PNG, JPEG, DICOM, ...). With `low_detail`, a model that cuts
    pictures into tiles sees only the overview; other models ignore it. `dicom` applies to DICOM files only."""

    data: bytes = field(repr=False)
    low_detail: bool = False
    dicom: DicomView | None = None


@dataclass(frozen=True)
class ImageUrl:
    """A picture in a message by URL, for a service that fetches it before the request is prepared."""

    url: str = field(repr=False)
    low_detail: bool = False
    dicom: DicomView | None = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; text and pictures in the order the caller gave them."""

    role: Role
    parts: tuple[TextPart | ImagePart | ImageUrl, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """A caller's request, before anything is decoded or tokenized. `system` replaces the template's system text;
    `template` names a template other than the model's own."""

    request_id: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    system: str | None = None
    template: str | None = None

    @property
    def num_images(self) -> int:
        """Pictures in all messages, fetched or not."""
        return sum(not isinstance(part, TextPart) for message in self.messages for part in message.parts)

    @property
    def has_addresses(self) -> bool:
        """Whether any pictures still have to be fetched."""
        return any(isinstance(part, ImageUrl) for message in self.messages for part in message.parts)


@dataclass(frozen=True)
class CompletionRequest:
    """A prompt to be continued, as text or as token ids: no template, no pictures."""

    request_id: str
    prompt: str | tuple[int, ...] = field(repr=False)
    sampling: SamplingParams

    @property
    def num_images(self) -> int:
        """Always 0."""
        return 0


@dataclass(frozen=True)
class RenderedRequest:
    """A prompt that the client has rendered from a template itself, with one `<image>` per picture. Control tokens in
    it are control tokens. `max_tokens` is only a wish: the answer is shorter where the context has less room."""

    request_id: str
    prompt: str = field(repr=False)
    images: tuple[ImagePart, ...]
    sampling: SamplingParams

    @property
    def num_images(self) -> int:
        """Number of pictures."""
        return len(self.images)


AnyRequest = GenerationRequest | CompletionRequest | RenderedRequest


@dataclass(frozen=True)
class PreparedImage:
    """A decoded picture as tiles: uint8 (num_tiles, size, size, 3). `digest` is the SHA-256 of the tiles, `size` as in
    ImageFeatures. `transform` is set for pictures whose stored values are not the values seen."""

    digest: str
    size: Size | None
    tiles: npt.NDArray[np.uint8] = field(repr=False)
    transform: ImageTransform | None = None


@dataclass(frozen=True)
class PreparedRequest:
    """Token ids with one sentinel per image token (prompts/tokenize.py), and the tiles of every picture, in order.

    `prompt` is the text the ids came from, with its `<image>`; `num_image_tokens` counts the sentinels per picture, and
    `transforms` repeats each PreparedImage's `transform` for receivers that get no tiles. For `goes_on` see
    EngineRequest.
    """

    request_id: str
    prompt_ids: tuple[int, ...] = field(repr=False)
    images: tuple[PreparedImage, ...]
    sampling: SamplingParams
    prompt: str = field(default="", repr=False)
    num_image_tokens: tuple[int, ...] = ()
    goes_on: bool = False
    transforms: tuple[ImageTransform | None, ...] = ()


@dataclass(frozen=True)
class ImageFeatures:
    """The tower's output for one picture: (rows of all its tiles, vision_hidden), before the projector.

    `size` is the picture's own in pixels, which determines how its tiles fit together; None where there is only the
    overview although the model cuts other pictures into tiles.
    """

    digest: str
    features: Tensor = field(repr=False)
    size: Size | None = None


@dataclass(frozen=True)
class BegunAnswer:
    """The tokens generated before an interruption, and whether the answer was already complete."""

    token_ids: Sequence[int] = field(default=(), repr=False)
    is_over: bool = False


@dataclass(frozen=True)
class EngineRequest:
    """A prompt the engine can run: ids with sentinels, and the features that replace them, in order.

    A lower `priority` runs sooner. `begun` has each of the answers as interrupted: incomplete ones resume after their
    tokens as if there had been no interruption. With `score_from` nothing is generated: the answer is the
    log-probabilities of the prompt's tokens from there on.
    """

    request_id: str
    prompt_ids: Sequence[int] = field(repr=False)
    features: Sequence[ImageFeatures]
    sampling: SamplingParams
    priority: int = 0
    begun: Sequence[BegunAnswer] = ()
    score_from: int | None = None
    goes_on: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, and the likeliest alternatives, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer; `image_tokens` and `cached_tokens` are parts of `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class TokenDelta:
    """An increment of an answer. The last one carries `finish_reason`, `usage` and `stage_ms`.

    `index` tells the answers of one request apart. `logprobs` has an entry per token where they were requested.
    `token_bytes` has the bytes of every token that `logprobs` names, and `transforms` each picture's transform; both
    only where the sender knows them.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stage_ms: StageTimes = field(default_factory=dict)
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
    transforms: tuple[ImageTransform | None, ...] = ()
