"""A visitor's talk as the messages of Gradio's chatbot, and which turn a message belongs to. Only values."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from deployments.page.talk import Turn

Message = dict[str, Any]


def render(talk: Sequence[Turn]) -> list[Message]:
    """Return the messages of all turns: pictures, question and answer, each if present."""
    return [message for turn in talk for message in _messages(turn)]


def turn_of(index: Any, talk: Sequence[Turn]) -> int | None:
    """Return the turn of the message with this index, None if there is no such message."""
    if isinstance(index, list | tuple) and index:
        index = index[0]
    owners = [number for number, turn in enumerate(talk) for _ in _messages(turn)]
    return owners[index] if isinstance(index, int) and 0 <= index < len(owners) else None


def _messages(turn: Turn) -> list[Message]:
    # Separate messages: where one holds pictures and text, Gradio cannot edit the text.
    pictures = [{"path": path} for path in turn.pictures]
    asked = [_message("user", content) for content in (*pictures, turn.question) if content]
    said = _said(turn)
    return [*asked, _message("assistant", said)] if said else asked


def _said(turn: Turn) -> str:
    """Return plain Markdown, because it is read aloud and copied as it stands. The service's own words are escaped."""
    # An answer may have stopped inside a code block.
    answer = f"{turn.answer}\n```" if turn.answer.count("```") % 2 else turn.answer
    problem = f"⚠ {html.escape(turn.problem)}" if turn.problem else ""
    figures = f"*{html.escape(turn.figures)}*" if turn.figures else ""
    return "\n\n".join(part for part in (answer, problem, figures) if part)


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}
