"""Checks before a request costs anything: it fits context and cache, its tokens exist, its features are sound.

Knows nothing about scheduling. An admitted request becomes one state per answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from llava_core.engine.detokenize import MOST_OPEN, Decoder, IncrementalDetokenizer
from llava_core.engine.prefix import ImageSpan
from llava_core.engine.request import RequestState
from llava_core.errors import EngineError, PromptTooLongError, RequestError
from llava_core.models.language import LanguageSide
from llava_core.prompts.budget import token_budget
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import BegunAnswer, EngineRequest


@dataclass
class Admission:
    """The limits of one model with a cache of `capacity` tokens."""

    model: LanguageSide
    decoder: Decoder
    capacity: int

    def __post_init__(self) -> None:
        self._vocab_size: int = self.model.decoder.config.vocab_size
        self._numbers = count()

    def admit(self, request: EngineRequest) -> list[RequestState]:
        """A state for each unfinished answer, numbered in order of arrival.

        Raises PromptTooLongError when the request cannot fit, RequestError for tokens that do not exist, EngineError
        for features that do not match the prompt or are not finite.
        """
        max_tokens = self._max_tokens(request)
        self._check_tokens(request)
        images = image_spans(request, self._count_rows(request))
        seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed
        answers = request.begun or [BegunAnswer()] * request.sampling.n
        return [
            RequestState(
                request=request,
                index=index,
                number=next(self._numbers),
                max_tokens=max_tokens,
                seed=seed,
                images=images,
                detokenizer=IncrementalDetokenizer(self.decoder, request.sampling.stop, _before(request)),
                tokens=[*request.prompt_ids, *answer.token_ids],
            )
            for index, answer in enumerate(answers)
            if not answer.is_over
        ]

    def _max_tokens(self, request: EngineRequest) -> int:
        num_prompt, context = len(request.prompt_ids), self.model.config.context_length
        if request.score_from is not None:
            # Nothing is generated: the prompt may fill the context.
            if num_prompt > context:
                raise PromptTooLongError(
                    f"the text to score has {num_prompt} tokens, but the model's context is {context}",
                    param="messages",
                )
            self._check_capacity(num_prompt, 0)
            return 0
        max_tokens = token_budget(num_prompt, request.sampling.max_tokens, context)
        # Without a requested length, the answer gets whatever room there is.
        self._check_capacity(num_prompt, request.sampling.max_tokens or 1)
        return min(max_tokens, self.capacity - num_prompt)

    def _check_capacity(self, num_prompt: int, num_output: int) -> None:
        if num_prompt + num_output > self.capacity:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} tokens and the answer up to {num_output}, but the cache for keys and "
                f"values holds {self.capacity}; shorten them, or give the engine a larger cache_tokens",
                param="messages",
            )

    def _check_tokens(self, request: EngineRequest) -> None:
        sampling, scored = request.sampling, request.score_from
        written = {token for answer in request.begun for token in answer.token_ids}
        self._check_known({*request.prompt_ids} - {IMAGE_TOKEN_ID} | written, "messages")
        self._check_known(sampling.stop_token_ids, "stop_token_ids")
        self._check_known([token for token, _ in sampling.logit_bias], "logit_bias")
        if request.begun and (len(request.begun) != sampling.n or scored is not None):
            raise RequestError(f"{len(request.begun)} answers were begun, but {sampling.n} are requested", param="n")
        if request.begun and all(answer.is_over for answer in request.begun):
            raise RequestError("every answer is finished, so there is nothing left to generate", param="n")
        if scored is None:
            return
        if not 1 <= scored < len(request.prompt_ids):
            raise RequestError(f"score_from must lie between 1 and {len(request.prompt_ids) - 1}, not {scored}")
        if IMAGE_TOKEN_ID in request.prompt_ids[scored:]:
            raise RequestError("pictures cannot be scored: score_from must lie after the last one")

    def _check_known(self, tokens: Iterable[int], param: str) -> None:
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise RequestError(
                    f"token {token} does not exist: the model knows 0 to {self._vocab_size - 1}", param=param
                )

    def _count_rows(self, request: EngineRequest) -> list[int]:
        return [self._count(number, request) for number in range(len(request.features))]

    def _count(self, number: int, request: EngineRequest) -> int:
        image, width = request.features[number], self.model.config.vision.hidden_size
        if image.features.ndim != 2 or image.features.shape[1] != width or not len(image.features):
            raise EngineError(
                f"features of picture {number + 1} have shape {tuple(image.features.shape)}, not (rows, {width})"
            )
        if not bool(torch.isfinite(image.features).all()):
            raise EngineError(f"features of picture {number + 1} hold values that are not finite")
        try:
            return self.model.num_image_rows(image)
        except ValueError as error:
            raise EngineError(f"features of picture {number + 1}: {error}") from None


def _before(request: EngineRequest) -> list[int] | None:
    """The prompt's last tokens: as many as can be part of the answer's first character, plus one for the space."""
    if not request.goes_on:
        return None
    return [token for token in request.prompt_ids[-MOST_OPEN - 1 :] if token != IMAGE_TOKEN_ID]


def image_spans(request: EngineRequest, num_rows: Sequence[int]) -> tuple[ImageSpan, ...]:
    """The pictures' positions in the prompt; `num_rows` is the number of placeholders that each fills.

    Raises EngineError when placeholders and pictures do not match.
    """
    places = [place for place, token in enumerate(request.prompt_ids) if token == IMAGE_TOKEN_ID]
    if len(places) != sum(num_rows):
        raise EngineError(f"the prompt has {len(places)} image placeholders but {sum(num_rows)} feature rows came")
    spans, first = [], 0
    for image, num in zip(request.features, num_rows, strict=True):
        start, stop = places[first], places[first + num - 1] + 1
        if stop - start != num:
            raise EngineError(f"the {num} placeholders of a picture are not in one piece")
        spans.append(ImageSpan(start, stop, image.digest, image.size))
        first += num
    return tuple(spans)
