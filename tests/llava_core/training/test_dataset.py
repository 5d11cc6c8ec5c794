"""LLaVA JSON to labelled examples: the reference's rules hold, and samples that teach nothing are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_core.checkpoints.tokenizer import CheckpointTokenizer, load_tokenizer
from llava_core.errors import LlavaError
from llava_core.prompts.conversation import Turn
from llava_core.prompts.templates import get_template
from llava_core.prompts.tokenize import IGNORE_LABEL, IMAGE_TOKEN_ID, TokenizedPrompt
from llava_core.training.dataset import DatasetError, Sample, build_example, load_samples, parse_sample


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> CheckpointTokenizer:
    return load_tokenizer(tiny_checkpoint)


def row(*messages: tuple[str, str | None], image: object = None, **extra: Any) -> dict[str, Any]:
    conversations = [{"from": speaker, "value": text} for speaker, text in messages]
    return {"id": "s1", "conversations": conversations, **({"image": image} if image else {}), **extra}


def learned(example: TokenizedPrompt, tokenizer: CheckpointTokenizer) -> str:
    kept = [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORE_LABEL]
    return tokenizer._inner.decode(kept)


def test_a_file_of_conversations_is_read(tmp_path: Path) -> None:
    rows = [row(("human", "<image>\nWhat?"), ("gpt", "A cat."), image="a.png"), row(("human", "Hi"), ("gpt", "Hello"))]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    first, second = load_samples(tmp_path / "data.json")
    assert first == Sample("s1", "a.png", (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat.")))
    assert second.image is None


def test_an_image_moves_to_the_front_of_its_message() -> None:
    sample = parse_sample(row(("human", "  What is this? <image> \n"), ("gpt", "x"), image="a.png"), 0)
    assert sample.turns[0].text == "<image>\nWhat is this?"


def test_a_first_message_that_is_not_the_humans_is_dropped() -> None:
    sample = parse_sample(row(("gpt", "Welcome"), ("human", "Hi"), ("gpt", "Hello")), 0)
    assert [turn.text for turn in sample.turns] == ["Hi", "Hello"]


def test_a_sample_without_id_is_named_by_its_index() -> None:
    assert (
        parse_sample({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]}, 7).id == "7"
    )


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (row(("human", "a"), ("human", "b")), "sample s1: message 1 breaks the alternation"),
        (row(("system", "a")), "human or gpt.*system"),
        ({"id": "s1"}, "sample s1: conversations need"),
        ({"id": "s1", "conversations": [{"from": "human"}]}, "`value`"),
        ({"id": "s1", "conversations": [None]}, "sample s1"),
        (row(("human", "a"), ("gpt", "b"), image="a.png"), r"0 <image> for image 'a.png'"),
        (row(("human", "<image>\na"), ("gpt", "b")), "1 <image> for image None"),
        (row(("human", "a"), ("gpt", "see <image>"), image="a.png"), "message 1 has <image> in an answer"),
        (row(("human", "<image>\na"), ("gpt", "b"), image=["a.png", "b.png"]), "image must be one path, not"),
        (row(("human", "a"), ("gpt", None)), "the value of message 1 must be a text, not None"),
        (row(("human", "a")), "no message of the human's with an answer"),
        (row(("gpt", "a")), "no message of the human's with an answer"),
        (row(), "no message of the human's with an answer"),
        (["s1"], "sample 0 must be an object, not list"),
    ],
)
def test_a_malformed_sample_is_named(bad: object, named: str) -> None:
    with pytest.raises(DatasetError, match=named):
        parse_sample(bad, 0)


@pytest.mark.parametrize(("content", "named"), [("{", "cannot be read"), ("{}", "not dict"), ("", "cannot be read")])
def test_a_damaged_file_is_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(DatasetError, match=rf"data.json .*{named}"):
        load_samples(tmp_path / "data.json")
    with pytest.raises(DatasetError, match=r"missing.json cannot be read"):
        load_samples(tmp_path / "missing.json")


def test_exactly_the_answers_are_learned(tokenizer: CheckpointTokenizer) -> None:
    turns = parse_sample(
        row(("human", "<image>\nQ1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "two\nlines"), image="a.png"), 0
    ).turns
    example = build_example(turns, get_template("vicuna_v1"), tokenizer, [3], max_length=1000)
    assert learned(example, tokenizer) == " A1</s> two\nlines</s>"
    assert example.ids.count(IMAGE_TOKEN_ID) == 3


def test_an_alignment_example_is_image_caption_newline(tokenizer: CheckpointTokenizer) -> None:
    turns = [Turn("user", "<image>\nDescribe it."), Turn("assistant", "A red star.")]
    example = build_example(turns, get_template("plain"), tokenizer, [2], max_length=100)
    assert example.ids[:3] == (1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID)
    assert learned(example, tokenizer) == "A red star.\n"
    assert len(example.ids) == 3 + len("A red star.\n")


@pytest.mark.parametrize(
    "turns",
    [
        [Turn("user", "no picture"), Turn("assistant", "A")],
        [Turn("user", "<image>")],
        [Turn("user", "<image>"), Turn("assistant", "A"), Turn("user", "Q"), Turn("assistant", "B")],
    ],
)
def test_alignment_needs_one_image_and_one_caption(tokenizer: CheckpointTokenizer, turns: list[Turn]) -> None:
    with pytest.raises(DatasetError, match="one message with <image> and one caption"):
        build_example(turns, get_template("plain"), tokenizer, [1], max_length=100)


def test_a_conversation_without_an_answer_is_refused(tokenizer: CheckpointTokenizer) -> None:
    with pytest.raises(DatasetError, match="no assistant text"):
        build_example([Turn("user", "Q")], get_template("vicuna_v1"), tokenizer, [], max_length=1000)


def test_a_too_long_conversation_is_refused_and_not_truncated(tokenizer: CheckpointTokenizer) -> None:
    turns = [Turn("user", "Q"), Turn("assistant", "A" * 50)]
    with pytest.raises(DatasetError, match="more than the limit of 60") as caught:
        build_example(turns, get_template("mistral_instruct"), tokenizer, [], max_length=60)
    assert isinstance(caught.value, LlavaError)
