"""The work of `llava chat`: open a model or a service, then run the chat. Parses no options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.chat.backends import Backend, LocalBackend, ServiceBackend
from llava_core.chat.session import Session
from llava_core.chat.terminal import Terminal, default_history
from llava_core.client import Client
from llava_core.errors import LlavaError
from llava_core.opening import ModelOptions, load_model, open_model
from llava_core.views import DicomView

# The fields of SamplingParams that a chat accepts as options.
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_tokens", "seed")


@dataclass(frozen=True)
class ChatOptions:
    """The options given to `llava chat`. `sampling` holds the fields of SamplingParams that were given; `view` is the
    view of DICOM files."""

    model: ModelOptions
    url: str | None
    api_key: str | None
    sampling: Mapping[str, Any]
    system: str | None
    load: Path | None
    keeps_history: bool
    view: DicomView | None = None


def chat(options: ChatOptions) -> None:
    """Run the chat until the input ends. Without a terminal, raises LlavaError if any line could not be answered."""
    terminal = Terminal(default_history() if options.keeps_history else None)
    with _backend(options, terminal) as backend, terminal.remembering():
        session = Session(backend, terminal, view=options.view)
        if options.load is not None:
            session.load(options.load)
        session.system = options.system or session.system
        if terminal.is_interactive:
            terminal.note(f"{backend.name}. /help lists commands, Ctrl-D ends.")
        session.run()
    if session.num_failed and not terminal.is_interactive:
        raise LlavaError(f"{session.num_failed} of the lines could not be answered")


@contextlib.contextmanager
def _backend(options: ChatOptions, terminal: Terminal) -> Iterator[Backend]:
    if options.url is not None:
        with Client(options.url, api_key=options.api_key) as client:
            yield ServiceBackend(client, options.model.model, options.sampling)
        return
    opened, name = open_model(options.model), options.model.model or "the default model"
    if terminal.is_interactive:
        terminal.note(f"Loading {name} ...")
    yield LocalBackend(name, opened.preparer, load_model(opened, options.model), options.sampling)
