"""The source of answers in a chat: a model in this process or a service, behind one interface.

Both raise KeyboardInterrupt on Ctrl-C, at a point where an answer can be left safely. Knows no terminal.
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
    """An increment of an answer."""

    @property
    def text(self) -> str:
        """The new text."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ended; set on the last delta."""
        ...


class Backend(Protocol):
    """Answers questions. `takes_addresses` is whether pictures may be given by URL."""

    @property
    def name(self) -> str:
        """The name of the model that answers."""
        ...

    @property
    def takes_addresses(self) -> bool:
        """Whether pictures given by URL are fetched."""
        ...

    def answer(self, history: Sequence[Message], question: Message, system: str | None) -> Generator[Delta, None, None]:
        """Stream the answer. Raises LlavaError and KeyboardInterrupt; closing the generator ends the answer."""
        ...


class LocalBackend:
    """A model in this process."""

    takes_addresses = False

    def __init__(self, name: str, preparer: Preparer, model: LocalModel, sampling: Mapping[str, Any]) -> None:
        self.name = name
        self._preparer, self._model = preparer, model
        self._sampling = SamplingParams(**sampling)

    def answer(self, history: Sequence[Message], question: Message, system: str | None) -> Generator[Delta, None, None]:
        """Stream the answer. Ctrl-C takes effect between two engine steps, as a step must not be interrupted."""
        request = GenerationRequest(uuid.uuid4().hex, (*history, question), self._sampling, system)
        with _held_interrupts() as interrupted:
            for delta in self._model.stream(self._preparer.prepare(request)):
                yield delta
                if interrupted.is_set():
                    raise KeyboardInterrupt


class ServiceBackend:
    """A service. Ctrl-C closes the connection, which ends the request there."""

    takes_addresses = True

    def __init__(self, client: Client, name: str | None, sampling: Mapping[str, Any]) -> None:
        self._client, self._sampling = client, sampling
        self.name = name or next(iter(client.models()), "")
        if not self.name:
            raise LlavaError("the service serves no model")

    def answer(self, history: Sequence[Message], question: Message, system: str | None) -> Generator[Delta, None, None]:
        """Stream the answer. Ctrl-C takes effect at once."""
        with self._client.stream(question, history=history, system=system, model=self.name, **self._sampling) as answer:
            yield from answer


@contextlib.contextmanager
def _held_interrupts() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C only sets the event. No effect outside the main thread, where Python has no signals."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
