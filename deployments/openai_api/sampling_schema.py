"""The fields that chats and completions have in common: how an answer is sampled, where it ends, and how it is sent.

The bounds are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`, `min_tokens` and `ignore_eos` are
named as vLLM names them, `timings` is ours. Knows no prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from deployments.openai_api.schema import Body, Part
from llava_core.errors import RequestError
from llava_core.types import GREEDY_BELOW, SamplingParams

# The range of torch's seeds.
_SEED_BOUND = 2**63
_MAX_STOPS, _MAX_STOP_LENGTH = 4, 256
# Each of them costs time at every token.
_MAX_STOP_TOKENS, _MAX_BIASES = 128, 300
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")


def text_or_list(value: Any) -> str | None:
    """The tag for a union of text and list; tags in angle brackets do not appear in error messages."""
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    Discriminator(
        text_or_list, custom_error_type="stop_type", custom_error_message="must be a string or a list of strings"
    ),
]
# Larger than any count; numbers of thousands of digits would fail wherever they are formatted.
WHOLE_BOUND = 2**31
Token = Annotated[int, Field(ge=0, lt=WHOLE_BOUND)]


class StreamOptions(Part):
    """What a stream should have besides the answer."""

    include_usage: bool = False


class SamplingBody(Body):
    """The fields that chats and completions share."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {
        "best_of": (1,),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "prompt_logprobs": (),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
        "logits_processors": ([],),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "response_format": ({"type": "text"},),
        "truncate_prompt_tokens": (),
        "add_special_tokens": (True,),
        "skip_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "return_tokens_as_token_ids": (False,),
        "return_token_ids": (False,),
        "echo": (False,),
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings: bool | None = None
    n: int | None = Field(default=None, ge=1, lt=WHOLE_BOUND)
    max_tokens: int | None = Field(default=None, ge=1, lt=WHOLE_BOUND)
    min_tokens: int | None = Field(default=None, ge=0, lt=WHOLE_BOUND)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=WHOLE_BOUND)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=_MAX_BIASES)
    seed: int | None = Field(default=None, ge=-_SEED_BOUND, lt=_SEED_BOUND)
    stop: Stop | None = None
    stop_token_ids: list[Token] | None = Field(default=None, max_length=_MAX_STOP_TOKENS)
    ignore_eos: bool | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream should end with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """How to sample the answer: greedily if no temperature is given. Raises RequestError naming the field."""
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens is {min_tokens}, but the answer may have {max_tokens} at most", param="min_tokens"
            )
        temperature = self.temperature or 0.0
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            seed=self.seed,
            stop=read_stops(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=min_tokens,
            n=1 if self.n is None else self.n,
            logprobs=logprobs,
        )


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for name in given:
        # Only one spelling of each, so that no token occurs twice.
        if not _TOKEN_ID.fullmatch(name):
            raise RequestError("logit_bias: the keys must be token ids, without leading zeros", param="logit_bias")
    return tuple((int(name), bias) for name, bias in given.items())


def read_stops(stop: str | list[str] | None) -> tuple[str, ...]:
    """The stop strings. Raises RequestError for too many, or for one that is empty or too long."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > _MAX_STOPS:
        raise RequestError(f"stop holds {len(texts)} strings; at most {_MAX_STOPS} are allowed", param="stop")
    for text in texts:
        if not 1 <= len(text) <= _MAX_STOP_LENGTH:
            raise RequestError(
                f"each stop string must have 1 to {_MAX_STOP_LENGTH} characters, not {len(text)}", param="stop"
            )
    return texts
