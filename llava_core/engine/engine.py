"""The generation engine: add requests, step, abort. A step decodes one token of every answer and prefills prompts.

Synchronous and single-threaded (async_engine.py adds the thread). The scheduler decides what runs and the runner
computes it; this module chooses tokens and confines each failure to its own request. Knows nothing about HTTP, prompt
texts or pictures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from llava_core.engine.admission import Admission
from llava_core.engine.attention import Backend
from llava_core.engine.blocks import BlockPool
from llava_core.engine.config import EngineConfig
from llava_core.engine.detokenize import Decoder
from llava_core.engine.request import RequestFailure, RequestState
from llava_core.engine.runner import ModelRunner, cache_tokens, choose_backend, wanted
from llava_core.engine.sampler import (
    choose,
    is_finite,
    is_greedy,
    peaks,
    process,
    takes_likeliest,
    token_logprob,
    uniform,
)
from llava_core.engine.scheduler import Chunk, Scheduler
from llava_core.engine.stats import EngineStats
from llava_core.errors import EngineError, LlavaError, OverloadedError, RequestError
from llava_core.models.language import LanguageSide
from llava_core.types import EngineRequest, TokenDelta

logger = logging.getLogger(__name__)

StepOutput = TokenDelta | RequestFailure
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class _Logits:
    """Logits (rows, vocab) of a chunk's wanted positions; per row, whether they are finite and the likeliest token."""

    rows: Tensor
    are_finite: list[bool]
    likeliest: list[int]


class Engine:
    """Continuous generation for prompts whose image features were computed elsewhere."""

    def __init__(
        self,
        model: LanguageSide,
        decoder: Decoder,
        config: EngineConfig | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        self.model = model
        self.config = config or EngineConfig()
        backend = backend or choose_backend(model)
        block_size = self.config.block_size or backend.block_size
        if block_size % backend.block_multiple:
            raise EngineError(
                f"block_size {block_size} is not a multiple of {backend.block_multiple}, which this device needs"
            )
        num_blocks = -(-cache_tokens(model, self.config, backend) // block_size)
        self.pool = BlockPool(num_blocks, block_size)
        self.stats = EngineStats(num_blocks)
        self._admission = Admission(model, decoder, num_blocks * block_size)
        self._scheduler = Scheduler(self.config.max_running, self.config.step_limits(model.device.type), self.pool)
        max_recorded = self.config.max_running if self.config.decode_graphs else 0
        self._runner = ModelRunner(model, backend, num_blocks, block_size, max_recorded=max_recorded)
        self._eos_ids = frozenset(model.config.eos_token_ids)
        # Answers by their request's id.
        self._states: dict[str, list[RequestState]] = {}
        self._ready: list[StepOutput] = []

    @property
    def num_waiting(self) -> int:
        """Answers that have been admitted but not started, or were preempted."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Answers that hold a part of the cache."""
        return len(self._scheduler.running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._states or self._ready)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises the errors of `Admission.admit` for a request that cannot be served, OverloadedError when the queue is
        full, ValueError for an id that is in use.
        """
        if request.request_id in self._states:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        states = self._admission.admit(request)
        room = self.config.max_requests
        if len(states) > room:
            raise RequestError(f"n is {len(states)}, but the engine takes {room} answers at once", param="n")
        # A resumed request has been accepted once already, elsewhere.
        if not request.begun and self.num_waiting + self.num_running + len(states) > room:
            raise OverloadedError(f"{self.num_waiting} requests are waiting already; try again later", limit="engine")
        self._states[request.request_id] = states
        for state in tuple(states):
            self._scheduler.add(state)
            if request.begun and self._is_over(state):
                state.skipped()
                self._ready.append(self._finish(state, TokenDelta(state.request_id, "", index=state.index)))

    def abort(self, request_id: str) -> None:
        """Drop a request in whatever state; unknown ids are ignored, because it may just have finished."""
        for state in self._states.pop(request_id, ()):
            self._scheduler.remove(state)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Run the tokens that the scheduler chose; returns the answers' deltas, and failures."""
        outputs, self._ready = self._ready, []
        began = time.perf_counter()
        chunks = self._scheduler.schedule()
        for chunk, result in self._run(chunks):
            # The failure of one answer may have ended the request's others.
            if chunk.state in self._states.get(chunk.state.request_id, ()):
                outputs += self._settle(chunk, result)
        self._count(chunks, time.perf_counter() - began)
        return outputs

    def _run(self, chunks: list[Chunk]) -> Iterator[tuple[Chunk, _Logits | Exception]]:
        """Yield the logits of each chunk's wanted positions. A failed batch is retried chunk by chunk."""
        if not chunks:
            return
        logits = _attempt(lambda: self._runner.run(chunks))
        if isinstance(logits, Tensor):
            are_finite, likeliest = peaks(logits)
            if not logits.is_cpu and not all(_takes_likeliest(chunk.state) for chunk in chunks):
                # All rows at once: every separate read would wait for the device.
                logits = logits.cpu()
            first = 0
            for chunk in chunks:
                own = slice(first, first + len(wanted(chunk)))
                yield chunk, _Logits(logits[own], are_finite[own], likeliest[own])
                first = own.stop
        elif len(chunks) == 1:
            yield chunks[0], logits
        else:
            for chunk in chunks:
                yield from self._run([chunk])

    def _settle(self, chunk: Chunk, result: _Logits | Exception) -> list[StepOutput]:
        """Apply a chunk's result to its answer."""
        state = chunk.state
        if isinstance(result, Exception):
            return [self._fail(state, result)]
        if not all(result.are_finite):
            return [self._fail(state, EngineError("the model produced values that are not finite"))]
        self._scheduler.computed(chunk)
        if state.request.score_from is not None:
            for place, logits in zip(wanted(chunk), result.rows, strict=True):
                num_top = state.request.sampling.logprobs or 0
                state.prompt_logprobs.append(token_logprob(logits, state.tokens[place + 1], num_top))
            return [self._finish(state, TokenDelta(state.request_id, ""))] if chunk.is_last else []
        if not chunk.is_last:
            return []
        delta = _attempt(lambda: self._write(state, result.rows[0], result.likeliest[0]))
        return [self._fail(state, delta) if isinstance(delta, Exception) else delta]

    def _write(self, state: RequestState, logits: Tensor, likeliest: int) -> TokenDelta:
        """Choose the next token; `likeliest` is the likeliest token by `logits` alone."""
        sampling = state.request.sampling
        ends = state.ends(self._eos_ids)
        processed = process(logits, sampling, state.request.prompt_ids, state.output_ids, ends)
        if processed is not logits and not is_finite(processed):
            raise EngineError("with these penalties or this bias the logits are not finite; choose smaller ones")
        if processed is logits and is_greedy(sampling):
            token = likeliest
        else:
            token = choose(processed, sampling, lambda: uniform(state.seed, state.index, state.num_output))
        logprobs = () if sampling.logprobs is None else (token_logprob(logits, token, sampling.logprobs),)
        state.tokens.append(token)
        state.wrote()
        self.stats.output_tokens += 1
        text = "" if token in ends else state.detokenizer.add(token)
        delta = TokenDelta(state.request_id, text, (token,), index=state.index, logprobs=logprobs)
        return delta if state.finish_reason(self._eos_ids) is None else self._finish(state, delta)

    def _is_over(self, state: RequestState) -> bool:
        """Replay the tokens from before an interruption; returns whether they complete the answer."""
        for token in state.output_ids:
            if not state.is_end(token, self._eos_ids):
                state.detokenizer.add(token)
        return state.finish_reason(self._eos_ids) is not None

    def _last(self, state: RequestState, delta: TokenDelta) -> TokenDelta:
        """The answer's last delta, with everything known at its end."""
        # The text held back may contain a stop string.
        text = delta.text + state.detokenizer.finish()
        reason = state.finish_reason(self._eos_ids)
        assert reason is not None, state
        self.stats.num_finished += 1
        return replace(
            delta,
            text=text,
            finish_reason=reason,
            usage=state.usage(),
            stage_ms=state.stage_ms(),
            logprobs=delta.logprobs or tuple(state.prompt_logprobs),
        )

    def _finish(self, state: RequestState, delta: TokenDelta) -> TokenDelta:
        self._scheduler.remove(state)
        states = self._states[state.request_id]
        states.remove(state)
        if not states:
            del self._states[state.request_id]
        return self._last(state, delta)

    def _fail(self, state: RequestState, error: Exception) -> RequestFailure:
        """End all answers of a request. Its blocks in the cache are withdrawn from other requests."""
        logger.error("request %s failed: %s", state.request_id, error)
        if not isinstance(error, LlavaError):
            error = EngineError(f"generation failed: {error}")
        self.pool.disown(state.blocks)
        self.abort(state.request_id)
        self.stats.num_failed += 1
        return RequestFailure(state.request_id, error)

    def _count(self, chunks: list[Chunk], seconds: float) -> None:
        stats = self.stats
        # A step after an abort may have nothing to run, which would only distort the means.
        if chunks:
            stats.num_steps += 1
            stats.step_seconds += seconds
            stats.batch_size = len(chunks)
            stats.scheduled_requests += len(chunks)
            stats.computed_tokens += sum(chunk.length for chunk in chunks)
        stats.cached_tokens = self._scheduler.num_cached
        stats.num_preemptions = self._scheduler.num_preemptions
        stats.num_running, stats.num_waiting = self.num_running, self.num_waiting
        stats.num_unread = self._scheduler.num_unread
        stats.used_blocks, stats.idle_blocks = self.pool.num_used, self.pool.num_idle


def _takes_likeliest(state: RequestState) -> bool:
    return state.request.score_from is None and takes_likeliest(state.request.sampling, state.num_output)


def _attempt(step: Callable[[], Outcome]) -> Outcome | Exception:
    """The step's result or exception. The last resort: an error in one request must not end the others."""
    try:
        return step()
    except Exception as error:
        logger.exception("a step of the engine failed")
        return error
