"""A whole model in one process: the same preparation, tower and engine that the service runs as separate replicas.

For the command line, notebooks, evaluation and tests. Knows nothing about HTTP or Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_core.checkpoints.describe import load_preparer
from llava_core.checkpoints.files import DEFAULT_MODEL as DEFAULT_MODEL
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.tokenizer import CheckpointTokenizer, load_tokenizer
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine, StepOutput
from llava_core.engine.request import RequestFailure
from llava_core.evaluation.task import Answer, Sample
from llava_core.lru import LruCache
from llava_core.models.fused import ready_language
from llava_core.request_limits import RequestLimits
from llava_core.types import (
    AnyRequest,
    EngineRequest,
    GenerationRequest,
    ImageFeatures,
    ImagePart,
    Message,
    PreparedRequest,
    SamplingParams,
    TextPart,
    TokenDelta,
)
from llava_core.vision.encode import encode_images
from llava_core.vision.inference import ready_tower


class LocalModel:
    """Answers requests with a checkpoint loaded into this process."""

    def __init__(
        self,
        model: str | Path | Checkpoint = DEFAULT_MODEL,
        *,
        options: LoadOptions | None = None,
        template: str | None = None,
        limits: RequestLimits | None = None,
        engine: EngineConfig | None = None,
        tokenizer: CheckpointTokenizer | None = None,
        cache_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        """Load a folder, hub id or opened checkpoint; `tokenizer` is its tokenizer where already loaded. Up to
        `cache_bytes` of picture features are cached for further questions about the same pictures.

        Raises CheckpointError for a checkpoint that is missing, damaged or not understood.
        """
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        options = options or LoadOptions()
        tokenizer = tokenizer or load_tokenizer(checkpoint)
        self.preparer = load_preparer(checkpoint, tokenizer, template=template, limits=limits)
        self.tower = load_tower(checkpoint, options)
        self.feature_cache = LruCache[ImageFeatures](cache_bytes)
        language = load_language_side(checkpoint, options, num_tokens=tokenizer.num_tokens)
        ready_tower(self.tower)
        ready_language(language)
        self.engine = Engine(language, tokenizer, engine)
        self._streams: dict[str, deque[StepOutput]] = {}

    def stream(self, request: AnyRequest | PreparedRequest) -> Generator[TokenDelta, None, None]:
        """Yield deltas of a request's answers as they are produced; one thread may interleave several streams. Closing
        the generator early ends the request.

        Raises RequestError for the caller's mistakes.
        """
        self.add(request)
        mine = self._streams[request.request_id] = deque()
        num_open = request.sampling.n
        try:
            while True:
                while not mine:
                    self._step()
                output = mine.popleft()
                if isinstance(output, RequestFailure):
                    raise output.error
                yield output
                num_open -= output.finish_reason is not None
                if not num_open:
                    return
        finally:
            del self._streams[request.request_id]
            self.engine.abort(request.request_id)

    def _step(self) -> None:
        for output in self.engine.step():
            if output.request_id in self._streams:
                self._streams[output.request_id].append(output)

    def add(self, request: AnyRequest | PreparedRequest) -> None:
        """Prepare, encode and queue a request; `engine.step()` then advances it together with the others."""
        prepared = request if isinstance(request, PreparedRequest) else self.preparer.prepare(request)
        features = encode_images(self.tower, prepared.images, self.feature_cache)
        self.engine.add_request(
            EngineRequest(
                prepared.request_id, prepared.prompt_ids, features, prepared.sampling, goes_on=prepared.goes_on
            )
        )


@dataclass(frozen=True)
class LocalAnswerer:
    """An evaluation's Answerer in this process; up to `together` questions run concurrently."""

    model: LocalModel
    together: int = 8

    def answer(self, samples: Sequence[Sample]) -> Generator[Answer, None, None]:
        """Yield answers in the order they finish. Raises the error of the first request that fails. Closing the
        generator early ends the requests that are open."""
        waiting = deque(samples)
        open_streams = deque[tuple[Sample, Generator[TokenDelta, None, None], list[str]]]()
        try:
            while waiting or open_streams:
                while waiting and len(open_streams) < self.together:
                    sample = waiting.popleft()
                    message = Message("user", (ImagePart(sample.image), TextPart(sample.question)))
                    request = GenerationRequest(sample.id, (message,), SamplingParams(max_tokens=256))
                    open_streams.append((sample, self.model.stream(request), []))
                sample, deltas, texts = open_streams[0]
                if (delta := next(deltas, None)) is None:
                    open_streams.popleft()
                    yield Answer(sample, "".join(texts))
                else:
                    texts.append(delta.text)
                    open_streams.rotate(-1)
        finally:
            for _, deltas, _ in open_streams:
                deltas.close()
