"""The default model's tokenizer: any text survives a round trip, printed words are spelled, the template is known."""

import re

import pytest
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.tokenizer import CheckpointTokenizer, choose_template
from llava_core.scenes.tokenizer import TEMPLATE_NAME, train_tokenizer
from llava_core.scenes.vocabulary import PRINTED_WORDS


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return [text[start:end] for _, start, end in CheckpointTokenizer(tokenizer).encode(text)]


@pytest.mark.parametrize("text", ["Where is the red star?", "日本 naïve 🙂", "  HELLO\n\n42 ", "a</s>"])
def test_any_text_survives_a_round_trip(world_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = world_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert world_tokenizer.decode(ids) == text


@pytest.mark.parametrize("word", [*PRINTED_WORDS[:20], "XQZ", "1984"])
def test_capitals_and_digits_are_spelled(world_tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    found = pieces(world_tokenizer, f"The word is {word}.")
    assert [piece for piece in found if re.fullmatch(r"[A-Z0-9]", piece)][-len(word) :] == list(word)


def test_an_initial_capital_is_not_spelled(world_tokenizer: PreTrainedTokenizerFast) -> None:
    assert "T" not in pieces(world_tokenizer, "The picture")


def test_frequent_words_are_single_tokens(world_tokenizer: PreTrainedTokenizerFast) -> None:
    assert " circle" in pieces(world_tokenizer, "a circle")


def test_roles_are_single_tokens_and_the_image_is_special(world_tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(world_tokenizer, "USER: hi ASSISTANT:")[0] == "USER:"
    assert "<image>" in CheckpointTokenizer(world_tokenizer).reserved_texts
    assert world_tokenizer.decode(world_tokenizer("a<image>b")["input_ids"], skip_special_tokens=True) == "ab"
    assert world_tokenizer.bos_token == "<s>"
    assert world_tokenizer("x")["input_ids"][0] == world_tokenizer.bos_token_id


def test_the_chat_template_is_recognised_as_ours(world_tokenizer: PreTrainedTokenizerFast) -> None:
    assert choose_template(CheckpointTokenizer(world_tokenizer), None).name == TEMPLATE_NAME


def test_the_same_seed_gives_the_same_vocabulary() -> None:
    one, other = (train_tokenizer(seed=5, num_scenes=20, vocab_size=320).get_vocab() for _ in range(2))
    assert one == other
