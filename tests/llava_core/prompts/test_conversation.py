"""Rendering: each style as plain text, the spans of the answers, and refused conversations."""

import pytest

from llava_core.prompts.conversation import Turn, render, user_turns
from llava_core.prompts.templates import TEMPLATES, get_template

OPEN = Turn("assistant", None)
TURNS = [Turn("user", "<image>\nQ1"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2")]


def text(name: str, turns: list[Turn], system: str | None = None) -> str:
    return render(get_template(name), turns, system=system).text


def test_the_two_separator_style() -> None:
    assert text("vicuna_v1", [*TURNS[:3], OPEN], "S") == "S USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"


def test_the_single_separator_style() -> None:
    assert (
        text("llava_v0", [*TURNS[:3], OPEN], "S") == "S###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:"
    )


def test_the_spaced_style_strips_messages_and_prompt() -> None:
    spaced = [Turn("user", " <image>\nQ1\n"), Turn("assistant", " A1 "), Turn("user", "Q2"), OPEN]
    assert text("vicuna_v1_med", spaced, "S") == "S USER: <image>\nQ1 ASSISTANT: A1</s> USER: Q2 ASSISTANT:"
    assert text("vicuna_v1_med", spaced[:1], "") == "USER: <image>\nQ1"


def test_examples_precede_the_conversation() -> None:
    rendered = text("multimodal", [Turn("user", "Q"), OPEN], "S")
    assert rendered == "S###Human: Hi!###Assistant: Hi there!  How can I help you today?\n###Human: Q###Assistant:"


def test_an_empty_question_is_an_open_slot_as_in_the_originals() -> None:
    assert text("vicuna_v1", [Turn("user", ""), OPEN], "S") == "S USER:ASSISTANT:"
    assert text("chatml_direct", [Turn("user", ""), OPEN]).endswith("<|im_start|>user\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("texts", "num_images", "start_end", "expected"),
    [
        (["What?"], 0, False, "What?"),
        (["What?"], 1, False, "<image>\nWhat?"),
        ([""], 1, False, "<image>\n"),
        (["a", "b"], 2, False, "<image>\n<image>\na\nb"),
        (["What?"], 2, True, "<im_start><image><im_end>\n<im_start><image><im_end>\nWhat?"),
    ],
)
def test_pictures_precede_the_texts(texts: list[str], num_images: int, *, start_end: bool, expected: str) -> None:
    assert user_turns(get_template("vicuna_v1"), texts, num_images, start_end=start_end) == [Turn("user", expected)]


def test_a_text_with_the_templates_inline_start_follows_the_picture() -> None:
    template = get_template("radialog")
    assert user_turns(template, [". Predicted"], 2) == [Turn("user", "<image>\n<image>. Predicted")]
    assert user_turns(template, ["Predicted"], 1) == [Turn("user", "<image>\nPredicted")]
    assert user_turns(template, [". Predicted"], 0) == [Turn("user", ". Predicted")]
    assert user_turns(get_template("vicuna_v1"), [". Predicted"], 1) == [Turn("user", "<image>\n. Predicted")]


def test_a_template_that_wraps_images_gives_them_their_own_exchange() -> None:
    turns = user_turns(get_template("v1_mmtag"), ["What is this?"], 1)
    assert text("v1_mmtag", [*turns, OPEN], "S") == (
        "S USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What is this? ASSISTANT:"
    )
    assert user_turns(get_template("v1_mmtag"), ["Hi"], 0) == [Turn("user", "Hi")]


def test_the_chatml_style() -> None:
    assert text("chatml_direct", [Turn("user", "Q"), OPEN], "S") == (
        "<|im_start|>system\nS<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"
    )


def test_the_instruct_style_puts_the_system_text_into_the_first_message() -> None:
    assert text("mistral_instruct", [*TURNS[:3], OPEN]) == "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]"
    assert text("mistral_instruct", TURNS[:1], "S") == "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nQ1 [/INST]"
    assert text("llava_llama_2", TURNS[:3], "S").count("<<SYS>>") == 1


def test_the_plain_style_has_neither_roles_nor_system_text() -> None:
    assert text("plain", TURNS[:2]) == "<image>\nQ1\nA1\n"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_empty_system_text_replaces_the_templates(name: str) -> None:
    assert TEMPLATES[name].system not in text(name, [Turn("user", "Q"), OPEN], "") or not TEMPLATES[name].system


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_spans_cover_exactly_the_answers_and_their_ends(name: str) -> None:
    rendered = render(get_template(name), TURNS)
    answers = [rendered.text[start:end] for start, end in rendered.answer_spans]
    assert [answer.split("A")[1][:1] for answer in answers] == ["1", "2"]
    assert all(answer.endswith(TEMPLATES[name].answer_end) for answer in answers)
    assert not any("Q" in answer or "USER" in answer or "Human" in answer for answer in answers)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_open_slot_has_no_span(name: str) -> None:
    assert render(get_template(name), [Turn("user", "Q"), OPEN]).answer_spans == ()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_an_empty_answer_has_a_span(name: str) -> None:
    (span,) = render(get_template(name), [Turn("user", "Q"), Turn("assistant", "")]).answer_spans
    assert span[1] - span[0] >= len(TEMPLATES[name].answer_end)


@pytest.mark.parametrize(
    ("turns", "named"),
    [
        ([Turn("assistant", "A")], "turn 0 must be the user's"),
        ([Turn("user", "Q"), Turn("user", "Q")], "turn 1 must be the assistant's"),
        ([Turn("user", None)], "turn 0 has no text"),
        ([Turn("user", "Q"), OPEN, Turn("user", "Q")], "turn 1 has no text"),
    ],
)
def test_turns_that_do_not_alternate_are_refused(turns: list[Turn], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        render(get_template("vicuna_v1"), turns)
