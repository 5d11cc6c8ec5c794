"""The engine on a thread of its own, seen from asyncio: one stream of deltas per request.

One cross-thread call per engine step, however many requests it advanced; a slow reader gets everything that has piled
up as one delta. Knows nothing about models.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from llava_core.engine.engine import Engine, StepOutput
from llava_core.engine.request import RequestFailure
from llava_core.engine.stats import EngineStats
from llava_core.errors import EngineError, LlavaError
from llava_core.types import EngineRequest, TokenDelta

logger = logging.getLogger(__name__)
_MAX_GAP_S = 0.2


def _nothing() -> None:
    pass


class _Mailbox:
    """One request's outputs that its reader has not taken yet; used on the event loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: list[StepOutput] = []
        self._arrived = asyncio.Event()
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: StepOutput) -> None:
        """Add an output and wake the reader once it is due, or at once if an answer has ended."""
        self._items.append(item)
        if isinstance(item, RequestFailure) or item.finish_reason is not None or self._loop.time() >= self._due:
            self._arrived.set()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due, self._arrived.set)

    async def take(self) -> list[StepOutput]:
        """Wait until woken, then return all outputs."""
        await self._arrived.wait()
        self._arrived.clear()
        self.close()
        taken, self._items = self._items, []
        return taken

    def rest(self, seconds: float) -> None:
        """Do not wake the reader for this long from now, unless an answer ends."""
        self._due = self._loop.time() + seconds

    def close(self) -> None:
        """Cancel a pending wake-up."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class AsyncEngine:
    """Owns an Engine and the only thread that touches it. Create and use it on one event loop.

    The gap between two deltas of an answer is at least `delta_gap_s` times the number of requests, but 0.2 s at most;
    outputs within the gap are joined. The first and the last delta come at once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        delta_gap_s: float = 0.0,
        before_step: Callable[[], None] = _nothing,
        when_idle: Callable[[], None] = _nothing,
    ) -> None:
        self._engine = engine
        self._delta_gap_s = delta_gap_s
        self._before_step, self._when_idle = before_step, when_idle
        self._loop = asyncio.get_running_loop()
        self._mailboxes: dict[str, _Mailbox] = {}
        # New requests, and ids to abort, in order of arrival.
        self._commands: list[EngineRequest | str] = []
        self._wake = threading.Condition()
        self._is_closed = False
        # Why the engine has stopped; set on the event loop once the thread has ended.
        self._ended: EngineError | None = None
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """The engine's counters. Its thread may be running: each number is right, but they may not be of one moment."""
        return self._engine.stats

    @property
    def max_running(self) -> int:
        """Answers that may be generated at once."""
        return self._engine.config.max_running

    @property
    def num_requests(self) -> int:
        """Requests that have a reader."""
        return len(self._mailboxes)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """Yield deltas until every answer has ended. Closing the generator early aborts the request at the next step,
        whose tokens are lost; so an id must not be given to another request.

        Raises the LlavaError that the request ended with, and EngineError when the engine has stopped.
        """
        if self._ended is not None:
            raise self._ended
        if request.request_id in self._mailboxes:
            raise EngineError(f"request id {request.request_id!r} is already in use")
        mailbox = self._mailboxes[request.request_id] = _Mailbox(self._loop)
        self._tell(request)
        num_open = request.sampling.n - sum(answer.is_over for answer in request.begun)
        try:
            while num_open:
                try:
                    deltas = merge(await mailbox.take())
                except LlavaError:
                    num_open = 0
                    raise
                for delta in deltas:
                    mailbox.rest(min(_MAX_GAP_S, self._delta_gap_s * len(self._mailboxes)))
                    num_open -= delta.finish_reason is not None
                    yield delta
        finally:
            self._mailboxes.pop(request.request_id).close()
            # A finished request needs no abort.
            if num_open:
                self._tell(request.request_id)

    def check_health(self, *, max_step_s: float = 120.0) -> None:
        """Raise EngineError when the thread has died or one step has taken longer than `max_step_s`."""
        # Readers learn of the end a moment before the thread has exited.
        if self._ended is not None or not self._thread.is_alive():
            raise EngineError("the engine thread is dead")
        started = self._step_started
        if started is not None and time.monotonic() - started > max_step_s:
            raise EngineError(f"an engine step has been running for more than {max_step_s} s")

    def close(self) -> None:
        """Stop the thread after its current step; running requests end with an error."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()

    def _tell(self, command: EngineRequest | str) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        cause = EngineError("the engine has stopped: it was closed")
        try:
            while (commands := self._next_commands()) is not None:
                outputs = self._obey(commands)
                self._before_step()
                self._step_started = time.monotonic()
                outputs += self._engine.step()
                self._step_started = None
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except Exception as error:
            # The last resort: the thread must not die without notifying its readers.
            logger.exception("the engine thread failed; every running request ends")
            cause = EngineError(f"the engine has stopped: {type(error).__name__}: {error}")
        self._end_all(cause)

    def _next_commands(self) -> list[EngineRequest | str] | None:
        """New requests and aborts; waits for some when the engine is idle. None once closed."""
        if not self._engine.has_work:
            self._when_idle()
        with self._wake:
            self._wake.wait_for(lambda: self._is_closed or self._commands or self._engine.has_work)
            if self._is_closed:
                return None
            commands, self._commands = self._commands, []
        return commands

    def _obey(self, commands: list[EngineRequest | str]) -> list[StepOutput]:
        refused: list[StepOutput] = []
        for command in commands:
            if isinstance(command, str):
                self._engine.abort(command)
                continue
            try:
                self._engine.add_request(command)
            except LlavaError as error:
                refused.append(RequestFailure(command.request_id, error))
            except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
                logger.exception("request %s could not be admitted", command.request_id)
                refused.append(
                    RequestFailure(command.request_id, EngineError(f"the request could not be admitted: {error}"))
                )
        return refused

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.put(output)

    def _end_all(self, cause: EngineError) -> None:
        def fail() -> None:
            self._ended = cause
            for request_id, mailbox in self._mailboxes.items():
                mailbox.put(RequestFailure(request_id, cause))

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(fail)


def merge(outputs: list[StepOutput]) -> list[TokenDelta]:
    """One delta per answer of a request. Raises a failure's error; nothing follows a failure."""
    answers: dict[int, list[TokenDelta]] = {}
    for output in outputs:
        if isinstance(output, RequestFailure):
            raise output.error
        answers.setdefault(output.index, []).append(output)
    return [_join(deltas) for deltas in answers.values()]


def _join(deltas: list[TokenDelta]) -> TokenDelta:
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )
