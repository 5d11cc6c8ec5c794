"""Stand-ins for handles and for the graph: they record their calls, and give prepared answers."""

import asyncio
import contextlib
import gc
from collections import Counter as Totals
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any, Self

from deployments.messages import Item, Rejected, StageHealth
from deployments.metrics import Counter, Histogram, Metric, Reading
from llava_core.prompts.tokenize import Tokenized
from llava_core.types import AnyRequest, TokenDelta, Usage


class FakeResponse:
    """A handle's response: awaitable once, cancellable. `work` makes the result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.is_cancelled = False

    def __await__(self) -> Any:
        async def value() -> Any:
            result = self._work()
            return await result if asyncio.iscoroutine(result) else result

        return value().__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeStream(FakeResponse):
    """A streaming handle's response."""

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._work()


class FakeHandle:
    """A deployment handle onto `methods`; remembers every call, its response and its session."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        self._methods = methods
        # Stages are told apart by their methods.
        self.deployment_name = "+".join(methods)
        self._method = "__call__"
        self._is_stream = False
        self._session = ""
        self.calls: list[tuple[str, tuple[Any, ...], FakeResponse]] = []
        self.sessions: list[str] = []

    def options(
        self,
        *,
        method_name: str | None = None,
        stream: bool | None = None,
        session_id: str | None = None,
        **_: Any,
    ) -> Self:
        bound = type(self)(**self._methods)
        bound._method = self._method if method_name is None else method_name
        bound._is_stream = self._is_stream if stream is None else stream
        bound._session = self._session if session_id is None else session_id
        bound.calls, bound.sessions = self.calls, self.sessions
        return bound

    def remote(self, *args: Any) -> FakeResponse:
        kind = FakeStream if self._is_stream else FakeResponse
        response = kind(lambda: self._methods[self._method](*args))
        self.calls.append((self._method, args, response))
        self.sessions.append(self._session)
        return response


class ScriptedEngine:
    """A graph that yields `items`, raising those that are exceptions; then waits forever if `hangs`."""

    def __init__(self, items: Sequence[Item | Exception] = (), *, hangs: bool = False) -> None:
        self.items = items
        self.hangs = hangs
        self.requests: list[AnyRequest] = []
        self.tokenized: Tokenized | Rejected = Tokenized((1, 5), (b"<s>", "é".encode()), 512)
        self.num_open = 0
        self.num_left_early = 0

    async def stream(self, request: AnyRequest, on_sent: Callable[[], None]) -> AsyncGenerator[Item, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            for item in self.items:
                if isinstance(item, Exception):
                    raise item
                yield item
            if self.hangs:
                await asyncio.Event().wait()
        except (GeneratorExit, asyncio.CancelledError):
            self.num_left_early += 1
            raise
        finally:
            self.num_open -= 1

    async def tokenize(self, request: AnyRequest) -> Tokenized | Rejected:
        self.requests.append(request)
        return self.tokenized

    async def detokenize(self, ids: Sequence[int]) -> str | Rejected:
        return self.tokenized if isinstance(self.tokenized, Rejected) else f"text of {list(ids)}"


STAGES = ("preprocessor", "vision_encoder", "generator")


async def all_ready() -> list[StageHealth]:
    """Return the state of the stages for /health, without a controller."""
    return [StageHealth(name, is_ready=True) for name in STAGES]


def answer(*texts: str, **last: Any) -> list[TokenDelta]:
    """Return the deltas of a whole answer."""
    *others, final = texts
    ending = {"finish_reason": "stop", "usage": Usage(11, len(texts), 4), "stage_ms": {"prefill": 2.0}} | last
    return [*(TokenDelta("id", text, (1,)) for text in others), TokenDelta("id", final, (2,), **ending)]


class FakeRecorder:
    """Remembers the recorded values, by metric and labels."""

    def __init__(self) -> None:
        self.counted: Totals[tuple[Metric, tuple[str, ...]]] = Totals()
        self.observed: defaultdict[tuple[Metric, tuple[str, ...]], list[float]] = defaultdict(list)
        self.watched: list[Callable[[], Iterable[Reading]]] = []

    def count(self, counter: Counter, *labels: str, by: float = 1) -> None:
        assert len(labels) == len(counter.labels), counter
        self.counted[counter, labels] += by  # type: ignore[assignment]

    def observe(self, histogram: Histogram, value: float, *labels: str) -> None:
        assert len(labels) == len(histogram.labels), histogram
        self.observed[histogram, labels].append(value)

    def watch(self, read: Callable[[], Iterable[Reading]]) -> None:
        self.watched.append(read)

    def readings(self) -> dict[tuple[Metric, tuple[str, ...]], float]:
        return {(metric, labels): value for read in self.watched for metric, value, labels in read()}


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """While the block runs, objects that refer to each other are not freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
