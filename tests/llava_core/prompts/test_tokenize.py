"""Ids with placeholders equal the reference's on its own examples; exactly the tokens inside answers are labelled."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llava_core.prompts.conversation import Rendered, Turn, render
from llava_core.prompts.templates import TEMPLATES, Style, get_template
from llava_core.prompts.tokenize import IGNORE_LABEL, IMAGE_TOKEN_ID, SEAM, as_text, tokenize_prompt


class CharTokenizer:
    """A tokenizer with one token per character, its code point; BOS is 1."""

    def __init__(self, bos_id: int | None = 1) -> None:
        self.bos_id = bos_id

    def encode(self, text: str) -> list[tuple[int, int, int]]:
        return [(ord(character), index, index + 1) for index, character in enumerate(text)]


class PairTokenizer(CharTokenizer):
    """A tokenizer with two characters per token from the start of each piece, so answers may begin inside a token."""

    def encode(self, text: str) -> list[tuple[int, int, int]]:
        return [(index + 1000, index, min(index + 2, len(text))) for index in range(0, len(text), 2)]


A, B, C, D = map(ord, "abcd")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab<image>cd", [A, B, -200, C, D]),
        ("<image>", [-200]),
        ("<image><image>", [-200, -200]),
        ("<image>a<image>", [-200, A, -200]),
        ("abcd", [A, B, C, D]),
        ("", []),
    ],
)
def test_ids_equal_the_references(text: str, expected: list[int]) -> None:
    images = [1] * text.count("<image>")
    assert tokenize_prompt(Rendered(text, ()), CharTokenizer(), images).ids == (1, *expected)
    assert tokenize_prompt(Rendered(text, ()), CharTokenizer(None), images).ids == tuple(expected)


def test_every_image_has_the_requested_number_of_placeholders() -> None:
    ids = tokenize_prompt(Rendered("a<image>b<image>", ()), CharTokenizer(), [3, 2]).ids
    assert ids == (1, A, *[IMAGE_TOKEN_ID] * 3, B, *[IMAGE_TOKEN_ID] * 2)


def test_pieces_around_an_image_are_tokenized_separately() -> None:
    # In a single text, `bc` would be one token.
    assert tokenize_prompt(Rendered("ab<image>cd", ()), PairTokenizer(), [1]).ids == (1, 1000, IMAGE_TOKEN_ID, 1000)
    assert tokenize_prompt(Rendered("abc<image>d", ()), PairTokenizer(), [1]).ids == (1, 1000, 1002, -200, 1000)


@pytest.mark.parametrize(("text", "images"), [("<image>", []), ("a", [1]), ("<image><image>", [1])])
def test_a_wrong_number_of_images_is_an_error_with_both_numbers(text: str, images: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{text.count('<image>')} <image> but {len(images)} images"):
        tokenize_prompt(Rendered(text, ()), CharTokenizer(), images)


def labelled(name: str, answers: list[str], image_tokens: int = 2) -> str:
    """Returns the text of all labelled tokens of a conversation with one image."""
    turns = [
        turn
        for index, answer in enumerate(answers)
        for turn in (Turn("user", ("<image>\n" if not index else "") + f"q{index}?"), Turn("assistant", answer))
    ]
    prompt = tokenize_prompt(render(get_template(name), turns), CharTokenizer(), [image_tokens])
    assert len(prompt.ids) == len(prompt.labels)
    assert all(label in (IGNORE_LABEL, token) for token, label in zip(prompt.ids, prompt.labels, strict=True))
    return "".join(chr(label) for label in prompt.labels if label != IGNORE_LABEL)


def test_labels_are_the_answers_with_their_ends() -> None:
    assert labelled("vicuna_v1", ["yes", "two red"]) == " yes</s> two red</s>"
    assert labelled("llava_v0", ["yes"]) == " yes###"
    assert labelled("mistral_instruct", ["yes", "no"]) == " yes </s> no </s>"
    assert labelled("chatml_direct", ["yes"]) == "yes<|im_end|>"


@given(
    name=st.sampled_from(sorted(TEMPLATES)), answers=st.lists(st.text("xyz é\n", max_size=12), min_size=1, max_size=4)
)
@example(name="vicuna_v1_med", answers=["\n"])
def test_only_answers_are_labelled(name: str, answers: list[str]) -> None:
    template = get_template(name)
    got = labelled(name, answers)
    for answer in answers:
        rendered = answer.strip() if template.style is Style.TWO_SPACED else answer
        before, after, rest = got.partition(rendered + " " * (template.style is Style.INSTRUCT) + template.answer_end)
        assert before in ("", " ")
        assert after
        got = rest
    assert got == ""


def test_a_token_across_the_border_of_an_answer_is_not_labelled() -> None:
    rendered = Rendered("qqqanswer", ((3, 9),))
    prompt = tokenize_prompt(rendered, PairTokenizer(None), [])
    assert prompt.labels == (IGNORE_LABEL, IGNORE_LABEL, 1004, 1006, 1008)


def test_an_image_inside_an_answer_is_not_labelled_but_what_follows_is() -> None:
    rendered = Rendered("a<image>b", ((0, 9),))
    assert tokenize_prompt(rendered, CharTokenizer(None), [2]).labels == (A, IGNORE_LABEL, IGNORE_LABEL, B)


def test_a_seam_separates_tokens_and_gives_none_itself() -> None:
    text = f"ab{SEAM}cd<image>a{SEAM}bcd"
    prompt = tokenize_prompt(Rendered(text, ((0, 5),)), PairTokenizer(None), [1])
    assert prompt.ids == (1000, 1000, IMAGE_TOKEN_ID, 1000, 1000, 1002)
    assert prompt.labels == (1000, 1000, *[IGNORE_LABEL] * 4)
    assert tokenize_prompt(Rendered(f"{SEAM}a{SEAM}", ()), CharTokenizer(None), []).ids == (A,)


CONTROLS = ("<s>", "</s>", "<image>", "<<s>>", "aa", "s>")


@given(st.lists(st.sampled_from([*CONTROLS, "<", "/s>", "a", "s", ">", "x", " "])).map("".join))
def test_seams_break_up_control_tokens_and_change_nothing_else(text: str) -> None:
    seamed = as_text(text, CONTROLS)
    assert not [control for control in CONTROLS if control in seamed]
    assert seamed.replace(SEAM, "") == text
    if not any(control in text for control in CONTROLS):
        assert seamed == text


def test_a_single_character_cannot_be_broken_by_a_seam() -> None:
    assert as_text("a#b", ["#"]) == "a#b"
