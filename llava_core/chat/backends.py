"""Who answers in a chat: a model in this process or a service, which look alike from here on.

Both raise KeyboardInterrupt from Ctrl-C where an answer can be left without harm. Knows no terminal.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llava_core.client import Client
from llava_core.errors import LlavaError
from llava_core.types import GenerationRequest, Message, SamplingParams

if TYPE_CHECKING:
    from llava_core.inference import LocalModel
    from llava_core.prepare import Preparer


class Delta(Protocol):
    """What an answer grew by."""

    @property
    def text(self) -> str:
        """The new text."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, on the last one."""
        ...


class Backend(Protocol):
    """Answers questions. `takes_addresses` is whether pictures may be given by web address."""

    @property
    def name(self) -> str:
        """Who answers."""
        ...

    @property
    def takes_addresses(self) -> bool:
        """Whether somebody fetches them."""
        ...

    def answer(self, history: Sequence[Message], question: Message, system: str | None) -> Generator[Delta, None, None]:
        """The answer as it comes. Raises LlavaError, and KeyboardInterrupt; closing it ends the answer."""
        ...


class LocalBackend:
    """A model in this process."""

    takes_addresses = False

    def __init__(self, name: str, preparer: Preparer, model: LocalModel, sampling: Mapping[str, Any]) -> None:
        self.name = name
        self._preparer, self._model = preparer, model
        self._sampling = SamplingParams(**sampling)

    def answer(self, history: Sequence[Message], question: Message, system: str | None) -> Generator[Delta, None, None]:
        """Ctrl-C takes effect between two steps of the engine, which must not be left half done."""
        request = GenerationRequest(uuid.uuid4().hex, (*history, question), self._sampling, system)
        with _held_interrupts() as interrupted:
            for delta in self._model.stream(self._preparer.prepare(request)):
                yield delta
                if interrupted.is_set():
                    raise KeyboardInterrupt


class ServiceBackend:
    """A service. Ctrl-C closes the connection, which frees the request there."""

    takes_addresses = True

    def __init__(self, client: Client, name: str | None, sampling: Mapping[str, Any]) -> None:
        self._client, self._sampling = client, sampling
        self.name = name or next(iter(client.models()), "")
        if not self.name:
            raise LlavaError("the service serves no model")

    def answer(self, history: Sequence[Message], question: Message, system: str | None) -> Generator[Delta, None, None]:
        """Ctrl-C takes effect at once."""
        with self._client.stream(question, history=history, system=system, model=self.name, **self._sampling) as answer:
            yield from answer


@contextlib.contextmanager
def _held_interrupts() -> Iterator[threading.Event]:
    """Within the block Ctrl-C only sets the event. Python has signals in the main thread alone."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
