"""A conversation's history, with a scripted client; test_synchronous.py tests it over sockets."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from llava_core.client.answers import Choice, Reply
from llava_core.client.conversation import Conversation
from llava_core.client.errors import ServerError
from llava_core.types import ImagePart, Message, TextPart

ANSWER = Message("assistant", (TextPart("yes"),))


class _Stream:
    reply = Reply((Choice("yes"),))


class _Client:
    """Records its questions and answers with `text` or an error."""

    def __init__(self, text: str | None = "yes") -> None:
        self.text = text
        self.asked: list[tuple[Message, dict[str, Any]]] = []

    def ask(self, question: Message, **given: Any) -> Reply:
        self.asked.append((question, given))
        if self.text is None:
            raise ServerError("broken")
        return Reply((Choice(self.text),))

    @contextlib.contextmanager
    def stream(self, question: Message, **given: Any) -> Iterator[_Stream]:
        self.asked.append((question, given))
        yield _Stream()


def conversation(client: _Client, **given: Any) -> Conversation:
    options = {"system": None, "history": (), "options": {}, **given}
    return Conversation(client, **options)  # type: ignore[arg-type]


def test_each_question_carries_the_history() -> None:
    client = _Client()
    talk = conversation(client, system="s", options={"seed": 1, "max_tokens": 2})
    talk.ask("One?", b"picture", max_tokens=3)
    with talk.stream("Two?"):
        pass
    one = Message("user", (ImagePart(b"picture"), TextPart("One?")))
    assert client.asked[0] == (one, {"history": (), "system": "s", "seed": 1, "max_tokens": 3})
    assert client.asked[1][1] == {"history": (one, ANSWER), "system": "s", "seed": 1, "max_tokens": 2}
    assert talk.messages == [one, ANSWER, Message("user", (TextPart("Two?"),)), ANSWER]


def test_a_failed_or_empty_answer_does_not_enter_the_history() -> None:
    for text in (None, ""):
        talk = conversation(_Client(text))
        with contextlib.suppress(ServerError):
            talk.ask("One?")
        assert talk.messages == []
    talk = conversation(_Client())
    with pytest.raises(ZeroDivisionError), talk.stream("One?"):
        raise ZeroDivisionError
    assert talk.messages == []


def test_a_history_can_be_given_and_changed() -> None:
    client = _Client()
    talk = conversation(client, history=[ANSWER])
    talk.messages.clear()
    talk.system = "other"
    talk.ask("One?")
    assert client.asked[0][1] == {"history": (), "system": "other"}
