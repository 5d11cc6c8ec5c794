"""Token bytes: joined, the bytes of a text's tokens are those of the text."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.sentencepiece_tokenizer import SentencePieceBackend
from llava_core.checkpoints.token_bytes import spelled_in_bytes, spelled_in_pieces
from llava_core.checkpoints.tokenizer import Backend, CheckpointTokenizer, load_tokenizer
from tests.original import sentencepiece_model
from tests.tiny import build_tokenizer


def _joined(backend: Backend | CheckpointTokenizer, text: str) -> bytes:
    return b"".join(backend.token_bytes(token) for token, _, _ in backend.encode(text))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_byte_level_tokens_join_to_the_text(text: str) -> None:
    assert _joined(CheckpointTokenizer(build_tokenizer()), text) == text.encode()


@pytest.mark.parametrize("text", ["What is it?", "a  b", "red circle\n", "Describe the picture."])
def test_the_default_models_tokens_join_to_the_text(text: str) -> None:
    assert _joined(load_tokenizer(DEFAULT_MODEL), text).decode().strip(" ") == text.strip(" ")


@pytest.mark.parametrize("text", ["What is it?", "a  b"])
def test_sentencepiece_tokens_join_to_the_text_after_a_space(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    assert _joined(SentencePieceBackend(tmp_path), text).decode() == " " + text


@pytest.mark.parametrize("text", ["one two", "one é 🙂two", "é"])
def test_fast_llama_tokens_join_to_the_text_after_a_space(text: str) -> None:
    entries = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *"onetw"]
    raw = Tokenizer(
        models.BPE({entry: index for index, entry in enumerate(entries)}, [], unk_token="<unk>", byte_fallback=True)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = CheckpointTokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert tokenizer.decode([token for token, _, _ in tokenizer.encode(text)]) == text
    assert _joined(tokenizer, text).decode() == " " + text


def test_a_token_added_later_has_its_text() -> None:
    tokenizer = CheckpointTokenizer(build_tokenizer())
    tokenizer.backend.add_special("<im_start>")
    assert tokenizer.token_bytes(tokenizer.num_tokens - 1) == b"<im_start>"


def test_control_tokens_give_their_names_and_unused_rows_nothing() -> None:
    tokenizer = CheckpointTokenizer(build_tokenizer())
    assert tokenizer.token_bytes(2) == b"</s>"
    assert tokenizer.token_bytes(tokenizer.num_tokens + 5) == b""


def test_vocabulary_entries_are_decoded() -> None:
    assert spelled_in_pieces("▁red") == b" red"
    assert spelled_in_pieces("<0xE2>") == b"\xe2"
    assert spelled_in_pieces("<0xe2>") == b"<0xe2>"
    assert spelled_in_bytes("Ġred") == b" red"
    assert spelled_in_bytes("Ã©") == "é".encode()
