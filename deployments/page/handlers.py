"""The page's event handlers, as functions of Gradio's values; layout.py defines what is on the page.

All input from a browser is checked here: it may name turns and examples that do not exist.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from deployments.page.answering import Asker
from deployments.page.examples import EXAMPLES
from deployments.page.log import Vote
from deployments.page.rendering import render, turn_of
from deployments.page.talk import Choices, Talk, Turn
from deployments.page.words import in_words
from llava_core.client import AuthenticationError
from llava_core.errors import LlavaError
from llava_core.views import DicomView, read_frame, read_window

# The names that Gradio's chatbot uses.
FEEDBACK = ("Like", "Dislike", "Flag")
_VOTES: dict[bool | str, Vote] = {True: "upvote", False: "downvote", "Flag": "flag"}
# An empty question box. With None it would take no more pictures.
_EMPTY: dict[str, Any] = {"text": "", "files": []}
# Values of the question box, the conversation, and its remembered state.
Shown = tuple[Any, Any, Any]
_UNCHANGED: Shown = (gr.skip(), gr.skip(), gr.skip())


@dataclass(frozen=True)
class Handlers:
    """The handlers of one page, for all its visitors."""

    asker: Asker

    async def look(self, key: str, model: str | None, request: gr.Request) -> tuple[Any, Any, Any]:
        """Return the service's status, the models to choose from, and whether to look again shortly."""
        try:
            names = await self.asker.models(key or None)
        except LlavaError as error:
            # Without the right key, asking again is pointless.
            again = not isinstance(error, AuthenticationError)
            return _status("waiting", in_words(error)), gr.skip(), gr.Timer(active=again)
        wanted = model or request.query_params.get("model")
        chosen = wanted if wanted in names else next(iter(names), None)
        return (
            _status("ready", f"{chosen} is ready" if chosen else "No model is served"),
            gr.Dropdown(names, value=chosen),
            gr.Timer(active=False),
        )

    def ask(self, asked: dict[str, Any], talk: Talk, frame: str, window: str) -> Shown:
        """Begin a question from the box. `frame` and `window`, here and below, are the DICOM settings as typed."""
        pictures = tuple(asked.get("files") or ())
        turn = Turn((asked.get("text") or "").strip(), pictures, view=_view(frame, window))
        return _begun(talk, turn) if turn.question or turn.pictures else _UNCHANGED

    def ask_example(self, event: gr.SelectData, talk: Talk) -> Shown:
        """Begin one of the examples that an empty conversation shows."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(EXAMPLES):
            return _UNCHANGED
        example = EXAMPLES[event.index]
        return _begun(talk, Turn(example.question, tuple(map(str, example.pictures))))

    def regenerate(self, event: gr.RetryData, talk: Talk, frame: str, window: str) -> Shown:
        """Ask a question again, with the current DICOM settings; later turns are dropped."""
        at = turn_of(event.index, talk)
        return _UNCHANGED if at is None else _begun(talk[:at], replace(talk[at], view=_view(frame, window)))

    def edit(self, event: gr.EditData, talk: Talk, frame: str, window: str) -> Shown:
        """Replace a question by another about the same pictures; later turns are dropped."""
        at = turn_of(event.index, talk)
        if at is None:
            return _UNCHANGED
        return _begun(talk[:at], replace(talk[at], question=str(event.value).strip(), view=_view(frame, window)))

    async def answer(self, talk: Talk, *chosen: Any) -> AsyncGenerator[tuple[Any, Any], None]:
        """Yield the conversation repeatedly as the answer to its open question grows. Closing this ends the request."""
        if not talk or not talk[-1].is_open:
            return
        *before, turn = talk
        choices, key, agreed = _choices(*chosen)
        answering = self.asker.answer(tuple(before), turn, choices, key=key, keep=agreed)
        async with contextlib.aclosing(answering) as states:
            async for state in states:
                talk = (*before, state)
                yield render(talk), talk

    def settle(self, talk: Talk) -> tuple[Any, Any, Any, Any]:
        """Run after an answer, however it ended: the box takes questions again, and a stopped answer is marked so. The
        last value is whether to look for the service again."""
        if talk and talk[-1].is_open:
            talk = (*talk[:-1], replace(talk[-1], figures="stopped", is_open=False))
        has_failed = bool(talk and talk[-1].problem)
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False), render(talk), talk, gr.Timer(active=has_failed)

    def clear(self) -> Shown:
        """Clear the conversation, and leave what is being typed: the visitor may have begun the next question."""
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False), [], ()

    def vote(self, event: gr.LikeData, talk: Talk, *chosen: Any) -> Talk:
        """Log a visitor's vote on an answer, if they agreed to that."""
        at, kind = turn_of(event.index, talk), _VOTES.get(event.liked)
        # Gradio reports some votes twice.
        if self.asker.log is None or at is None or kind is None or talk[at].vote == kind:
            return talk
        choices, _, agreed = _choices(*chosen)
        if not agreed:
            gr.Info("Votes are kept only with the conversation. Tick the box below it first.")
            return talk
        self.asker.log.vote(kind, talk[: at + 1], choices)
        gr.Info("Thank you.")
        return (*talk[:at], replace(talk[at], vote=kind), *talk[at + 1 :])


def _begun(before: Talk, turn: Turn) -> Shown:
    """Return a conversation that ends with an open question, and the box that can stop it."""
    talk = (*before, turn.begun())
    return gr.MultimodalTextbox(_EMPTY, submit_btn=False, stop_btn=True), render(talk), talk


def _choices(  # noqa: PLR0913 - as many as there are settings
    model: str | None,
    template: str | None,
    system: str,
    temperature: float,
    top_p: float,
    max_tokens: float,
    seed: str,
    key: str,
    agreed: bool,  # noqa: FBT001 - as Gradio gives it
) -> tuple[Choices, str | None, bool]:
    """Return the choices, the key, and whether the talk may be kept; the inputs come in the order of the layout."""
    return (
        Choices(
            model or "",
            template or None,
            system.strip(),
            temperature,
            top_p,
            int(max_tokens),
            _whole(seed),
        ),
        key.strip() or None,
        agreed,
    )


def _view(frame: str, window: str) -> DicomView | None:
    """Return the view for DICOM files; None: the files' own settings."""
    try:
        view = DicomView(
            read_frame(frame.strip()) if frame.strip() else 1, read_window(window.strip()) if window.strip() else None
        )
    except ValueError as error:
        raise gr.Error(f"DICOM, in the settings: {error}.", print_exception=False) from None
    return None if view == DicomView() else view


def _whole(text: str) -> int | None:
    try:
        return int(text) if text.strip() else None
    except ValueError:
        raise gr.Error("The seed must be a whole number, or empty.", print_exception=False) from None


def _status(kind: str, text: str) -> str:
    return f'<span class="status {kind}" role="status">{html.escape(text)}</span>'
