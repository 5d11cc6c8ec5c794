"""Turns rendered as messages of the chatbot, and messages mapped back to turns."""

from typing import Any

import pytest

from deployments.page.rendering import render, turn_of
from deployments.page.talk import Turn

TALK = (Turn("What?", ("/a.png", "/b.dcm"), "A cat.", "3 tokens"), Turn("And?", (), "", problem="It is busy."))


def test_a_turn_is_rendered_as_pictures_question_and_answer_with_figures() -> None:
    assert [(message["role"], message["content"]) for message in render(TALK)] == [
        ("user", {"path": "/a.png"}),
        ("user", {"path": "/b.dcm"}),
        ("user", "What?"),
        ("assistant", "A cat.\n\n*3 tokens*"),
        ("user", "And?"),
        ("assistant", "⚠ It is busy."),
    ]


@pytest.mark.parametrize(
    ("index", "turn"),
    [(0, 0), (2, 0), (3, 0), (4, 1), (5, 1), ([3, 0], 0), (6, None), (-1, None), (None, None), ("0", None), ([], None)],
)
def test_a_message_index_is_mapped_to_its_turn(index: Any, turn: int | None) -> None:
    assert turn_of(index, TALK) == turn


def test_an_unanswered_question_is_rendered_alone() -> None:
    assert render([Turn("What?", is_open=True)]) == [{"role": "user", "content": "What?"}]
    assert render([Turn("", ("/a.png",), is_open=True)]) == [{"role": "user", "content": {"path": "/a.png"}}]


def test_text_from_the_service_is_escaped() -> None:
    [_, message] = render([Turn("?", problem="<script>", figures="<b>")])
    assert message["content"] == "⚠ &lt;script&gt;\n\n*&lt;b&gt;*"


def test_unclosed_code_is_closed_before_the_figures() -> None:
    [_, message] = render([Turn("?", (), "```python\nx = 1", "3 tokens")])
    assert message["content"] == "```python\nx = 1\n```\n\n*3 tokens*"
