"""The tokenizer behind its two small interfaces, and the template, chosen by what it renders and never by name."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from llava_core.checkpoints.tokenizer import CheckpointTokenizer, choose_template, load_tokenizer
from llava_core.errors import CheckpointError, UnknownNameError
from tests.tiny import build_tokenizer, edit_json


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> CheckpointTokenizer:
    return load_tokenizer(tiny_checkpoint)


@pytest.mark.parametrize("text", ["Hello, world", "  two\n", "schön 日本 🙂", ""])
def test_text_survives_encoding_and_decoding(tokenizer: CheckpointTokenizer, text: str) -> None:
    assert tokenizer.decode([token for token, _, _ in tokenizer.encode(text)]) == text


def test_ids_are_the_inner_tokenizers_without_special_tokens(tokenizer: CheckpointTokenizer) -> None:
    expected = build_tokenizer()("abc", add_special_tokens=False)["input_ids"]
    assert [token for token, _, _ in tokenizer.encode("abc")] == expected
    assert tokenizer.bos_id == 1


def test_offsets_are_in_characters(tokenizer: CheckpointTokenizer) -> None:
    spans = [(start, end) for _, start, end in tokenizer.encode("aé!")]
    assert spans == [(0, 1), (1, 2), (1, 2), (2, 3)]


def test_decoding_leaves_special_tokens_out(tokenizer: CheckpointTokenizer) -> None:
    ids = [token for token, _, _ in tokenizer.encode("a</s>b")]
    assert 2 in ids
    assert tokenizer.decode(ids) == "ab"


def test_texts_of_control_tokens_are_reserved(tokenizer: CheckpointTokenizer) -> None:
    assert {"<s>", "</s>", "<unk>", "<image>"} <= tokenizer.reserved_texts
    assert "" not in tokenizer.reserved_texts


def test_control_tokens_known_only_to_the_tokenizer_file_are_reserved() -> None:
    inner = build_tokenizer()
    inner.backend_tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    inner.backend_tokenizer.add_tokens([AddedToken("USER:")])
    reserved = CheckpointTokenizer(inner).reserved_texts
    assert "<|im_end|>" in reserved
    assert "USER:" not in reserved


def test_the_template_that_renders_identically_is_chosen(tokenizer: CheckpointTokenizer) -> None:
    assert choose_template(tokenizer, None).name == "vicuna_v1"


def test_a_named_template_is_used_unchecked(tokenizer: CheckpointTokenizer) -> None:
    assert choose_template(tokenizer, "chatml_direct").name == "chatml_direct"
    with pytest.raises(UnknownNameError):
        choose_template(tokenizer, "nonsense")


@pytest.mark.parametrize("chat_template", ["{{ messages[0]['content'][1]['text'] }}", None])
def test_an_unknown_chat_template_is_refused(chat_template: str | None) -> None:
    inner = build_tokenizer()
    inner.chat_template = chat_template
    with pytest.raises(CheckpointError, match=r"none of ours.*vicuna_v1"):
        choose_template(CheckpointTokenizer(inner), None)


@pytest.mark.parametrize("chat_template", ["{% for %}", "{{ messages[7]['content'] }}", "{{ raise_exception('no') }}"])
def test_a_broken_chat_template_is_one_clear_error(chat_template: str) -> None:
    inner = build_tokenizer()
    inner.chat_template = chat_template
    with pytest.raises(CheckpointError, match="chat template"):
        choose_template(CheckpointTokenizer(inner), None)


def test_a_missing_fast_tokenizer_says_what_to_save(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing; save the fast form"):
        load_tokenizer(checkpoint_copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', '{"version": "2.0"}'])
def test_a_damaged_tokenizer_is_named(checkpoint_copy: Path, content: str) -> None:
    (checkpoint_copy / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read .*; download it again"):
        load_tokenizer(checkpoint_copy)


def test_the_class_named_in_its_config_does_not_matter(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "tokenizer_config.json", lambda config: config.update(tokenizer_class="LlamaTokenizer"))
    ids = [token for token, _, _ in load_tokenizer(checkpoint_copy).encode("abc")]
    assert ids == build_tokenizer()("abc", add_special_tokens=False)["input_ids"]
    assert json.loads((checkpoint_copy / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
