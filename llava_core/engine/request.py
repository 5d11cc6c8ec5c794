"""The state of one request inside the engine: what it asked, what it has produced, where its time went.

Imports no torch; the key-value cache and the random generator are held, not understood.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_core.errors import LlavaError
from llava_core.types import EngineRequest, FinishReason, StageTimes, Usage

if TYPE_CHECKING:
    import torch
    from transformers.cache_utils import Cache

    from llava_core.engine.detokenize import IncrementalDetokenizer


@dataclass(frozen=True)
class RequestFailure:
    """A request that ended with an error of its own; the others are not touched."""

    request_id: str
    error: LlavaError


@dataclass
class RequestState:
    """A request between admission and its end. Times are seconds of a monotonic clock."""

    request: EngineRequest
    max_tokens: int
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator
    cache: Cache | None = None
    output_ids: list[int] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    prefill_started: float = 0.0
    prefill_ended: float = 0.0

    @property
    def request_id(self) -> str:
        """The caller's id."""
        return self.request.request_id

    def finish_reason(self, eos_ids: frozenset[int]) -> FinishReason | None:
        """Why the request is over, or None while it is not."""
        is_eos = self.output_ids[-1] in eos_ids and not self.request.sampling.ignore_eos
        if is_eos or self.detokenizer.is_stopped:
            return "stop"
        return "length" if len(self.output_ids) >= self.max_tokens else None

    def usage(self) -> Usage:
        """Token counts so far."""
        # Not the features' rows: of a picture in tiles some are left out, and ends of lines come in.
        image_tokens = sum(token < 0 for token in self.request.prompt_ids)
        return Usage(len(self.request.prompt_ids), len(self.output_ids), image_tokens)

    def stage_ms(self) -> StageTimes:
        """Time spent waiting, in prefill and in decode, in milliseconds."""
        now = time.perf_counter()
        return {
            "queue": (self.prefill_started - self.arrived) * 1e3,
            "prefill": (self.prefill_ended - self.prefill_started) * 1e3,
            "decode": (now - self.prefill_ended) * 1e3,
        }
