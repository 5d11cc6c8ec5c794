"""The state of one answer inside the engine: its request, its tokens so far, where its time went.

Imports no torch; features are held but not interpreted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llava_core.engine.prefix import ImageSpan, next_key
from llava_core.errors import LlavaError
from llava_core.types import EngineRequest, FinishReason, StageTimes, TokenLogprob, Usage

if TYPE_CHECKING:
    from torch import Tensor

    from llava_core.engine.detokenize import IncrementalDetokenizer


@dataclass(frozen=True)
class RequestFailure:
    """A request that ended with an error of its own; other requests are unaffected."""

    request_id: str
    error: LlavaError


@dataclass(eq=False)
class RequestState:
    """One answer between admission and its end; a request for several answers has one state each, numbered by `index`.

    `tokens` are the prompt's and the answer's; the cache has the keys and values of the first `num_computed` tokens in
    `blocks`, the first `num_published` of which other requests can use. Times are seconds of a monotonic clock.
    """

    request: EngineRequest
    index: int
    number: int
    max_tokens: int
    seed: int
    images: tuple[ImageSpan, ...]
    detokenizer: IncrementalDetokenizer
    tokens: list[int]
    num_computed: int = 0
    num_published: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    # Projected rows of the pictures by number, during prefill.
    image_rows: dict[int, Tensor] = field(default_factory=dict, repr=False)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, repr=False)
    arrived: float = field(default_factory=time.perf_counter)
    prefill_started: float = 0.0
    prefill_ended: float = 0.0
    _keys: list[bytes] = field(default_factory=list, repr=False)

    @property
    def request_id(self) -> str:
        """The caller's id."""
        return self.request.request_id

    @property
    def is_running(self) -> bool:
        """Whether the answer holds blocks."""
        return bool(self.blocks)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt, placeholders included."""
        return len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that the model has not seen: 1 while the answer is being decoded."""
        return len(self.tokens) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far."""
        return self.tokens[self.num_prompt :]

    @property
    def num_output(self) -> int:
        """Number of the answer's tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def max_length(self) -> int:
        """Upper bound on the tokens of prompt and answer."""
        return self.num_prompt + self.max_tokens

    def num_shareable(self, block_size: int) -> int:
        """Number of blocks that may come from the cache. The last token must be run, and so must the token before the
        first one to be scored and all after it."""
        scored = self.request.score_from
        last = len(self.tokens) if scored is None else min(len(self.tokens), scored)
        return max(0, last - 1) // block_size

    def prefix_keys(self, block_size: int) -> Iterator[bytes]:
        """Keys of the blocks that may come from the cache, in order."""
        return (self.block_key(index, block_size) for index in range(self.num_shareable(block_size)))

    def block_key(self, index: int, block_size: int) -> bytes:
        """The key of a full block."""
        while len(self._keys) <= index:
            previous = self._keys[-1] if self._keys else b""
            start = len(self._keys) * block_size
            self._keys.append(next_key(previous, self.tokens, start, self.images, block_size=block_size))
        return self._keys[index]

    def started(self) -> None:
        """Note the time, and how much of the prompt was found in the cache, when the answer is first started."""
        if self.prefill_started == 0.0:
            self.prefill_started = time.perf_counter()
            # For a resumed answer, some of its own tokens may have been found too.
            self.num_cached = min(self.num_computed, self.num_prompt)

    def wrote(self) -> None:
        """Note the time of the first token."""
        if self.prefill_ended == 0.0:
            self.prefill_ended = time.perf_counter()

    def skipped(self) -> None:
        """Note that there is nothing left to generate."""
        self.prefill_started = self.prefill_ended = self.arrived

    def finish_reason(self, eos_ids: frozenset[int]) -> FinishReason | None:
        """Why the answer has ended, or None while it has not."""
        if self.num_output and (self.is_end(self.tokens[-1], eos_ids) or self.detokenizer.is_stopped):
            return "stop"
        return "length" if self.num_output >= self.max_tokens else None

    def ends(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end the answer and are not part of its text."""
        sampling = self.request.sampling
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)

    def is_end(self, token: int, eos_ids: frozenset[int]) -> bool:
        """Whether this token ends the answer and is not part of its text."""
        return token in self.ends(eos_ids)

    def usage(self) -> Usage:
        """Token counts so far."""
        # Not the number of feature rows: a tiled picture drops some rows and adds line ends.
        image_tokens = sum(image.stop - image.start for image in self.images)
        return Usage(self.num_prompt, self.num_output, image_tokens, self.num_cached)

    def stage_ms(self) -> StageTimes:
        """Time spent waiting, in prefill and in decode, in milliseconds."""
        now = time.perf_counter()
        # For a prompt that is only scored, all of the time is prefill.
        prefill_ended = self.prefill_ended or now
        return {
            "queue": (self.prefill_started - self.arrived) * 1e3,
            "prefill": (prefill_ended - self.prefill_started) * 1e3,
            "decode": (now - prefill_ended) * 1e3,
        }
