"""The generation engine: add requests, step, abort. One step moves every running request on by one token.

Synchronous and single-threaded (async_engine.py adds the thread). Each request has its own cache and random generator,
so what it produces does not depend on its neighbours. Knows nothing about HTTP, prompts' texts or pictures.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from llava_core.engine.detokenize import Decoder, IncrementalDetokenizer
from llava_core.engine.request import RequestFailure, RequestState
from llava_core.engine.sampler import build_generator, sample
from llava_core.errors import EngineError, LlavaError, OverloadedError
from llava_core.models.language import LanguageSide
from llava_core.prompts.budget import token_budget
from llava_core.types import EngineRequest, TokenDelta

logger = logging.getLogger(__name__)

StepOutput = TokenDelta | RequestFailure


@dataclass(frozen=True)
class EngineConfig:
    """`max_running` requests move on in every step, `max_waiting` more may queue; the next is refused."""

    max_running: int = 16
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.max_waiting < 0:
            raise ValueError(f"max_running must be at least 1 and max_waiting at least 0: {self}")


class Engine:
    """Continuous generation for prompts whose image features were made elsewhere."""

    def __init__(self, model: LanguageSide, decoder: Decoder, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._decoder = decoder
        self._eos_ids = frozenset(model.config.eos_token_ids)
        self._waiting: deque[RequestState] = deque()
        self._running: dict[str, RequestState] = {}

    @property
    def num_waiting(self) -> int:
        """Requests admitted but not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a cache."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises PromptTooLongError when it cannot fit, OverloadedError when the queue is full, ValueError for an id that
        is in use.
        """
        known = [*self._running, *(state.request_id for state in self._waiting)]
        if request.request_id in known:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        budget = token_budget(len(request.prompt_ids), request.sampling.max_tokens, self.model.config.context_length)
        if len(self._waiting) >= self.config.max_waiting:
            raise OverloadedError(f"{len(self._waiting)} requests are waiting already; try again later")
        detokenizer = IncrementalDetokenizer(self._decoder, request.sampling.stop)
        self._waiting.append(RequestState(request, budget, detokenizer, build_generator(request.sampling)))

    def abort(self, request_id: str) -> None:
        """Drop a request wherever it is; unknown ids are ignored, because it may just have finished."""
        self._running.pop(request_id, None)
        self._waiting = deque(state for state in self._waiting if state.request_id != request_id)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Prefill at most one waiting request and decode one token of every running one."""
        outputs = [self._advance(state, [state.output_ids[-1]]) for state in list(self._running.values())]
        if self._waiting and len(self._running) < self.config.max_running:
            outputs.append(self._prefill(self._waiting.popleft()))
        return outputs

    def _prefill(self, state: RequestState) -> StepOutput:
        state.cache = DynamicCache()
        state.prefill_started = time.perf_counter()
        self._running[state.request_id] = state
        output = self._advance(state, state.request.prompt_ids)
        state.prefill_ended = time.perf_counter()
        return output

    def _advance(self, state: RequestState, ids: Sequence[int]) -> StepOutput:
        """Run `ids` through the model, take one token, and settle what that means for the request."""
        try:
            token = sample(self._next_logits(state, ids), state.request.sampling, state.generator)
            state.output_ids.append(token)
            return self._settle(state, token)
        except Exception as error:
            # The last resort: whatever is wrong with one request must not end the others.
            self.abort(state.request_id)
            if isinstance(error, LlavaError):
                return RequestFailure(state.request_id, error)
            logger.exception("request %s failed", state.request_id)
            return RequestFailure(state.request_id, EngineError(f"generation failed: {error}"))

    def _next_logits(self, state: RequestState, ids: Sequence[int]) -> torch.Tensor:
        is_prefill = not state.output_ids
        images = state.request.features if is_prefill else ()
        sizes = [image.size for image in images]
        known = None if None in sizes else [size for size in sizes if size is not None]
        packed = torch.tensor([list(ids)], device=self.model.device)
        features = [image.features for image in images]
        logits: torch.Tensor = self.model(packed, features, state.cache, sizes=known, last_only=True)
        return logits[0, -1]

    def _settle(self, state: RequestState, token: int) -> TokenDelta:
        is_eos = token in self._eos_ids and not state.request.sampling.ignore_eos
        text = "" if is_eos else state.detokenizer.add(token)
        reason = state.finish_reason(self._eos_ids)
        if reason is None:
            return TokenDelta(state.request_id, text, (token,))
        del self._running[state.request_id]
        if state.prefill_ended == 0.0:
            state.prefill_ended = time.perf_counter()
        text += state.detokenizer.finish()
        return TokenDelta(state.request_id, text, (token,), reason, state.usage(), state.stage_ms())
