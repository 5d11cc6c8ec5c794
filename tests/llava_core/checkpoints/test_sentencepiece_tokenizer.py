"""`tokenizer.model`: ids at every boundary equal transformers 4's slow Llama tokenizer; offsets; damaged files."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from llava_core.checkpoints.sentencepiece_tokenizer import SentencePieceBackend
from llava_core.errors import CheckpointError
from tests.original import SP_SIZE, sentencepiece_model

CONTENT = sentencepiece_model()


def backend(folder: Path, **settings: object) -> SentencePieceBackend:
    (folder / "tokenizer.model").write_bytes(CONTENT)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return SentencePieceBackend(folder)


def pieces(tokenizer: SentencePieceBackend, text: str) -> list[str]:
    model = SentencePieceProcessor(model_proto=CONTENT)
    ids = [token for token, _, _ in tokenizer.encode(text)]
    return [model.id_to_piece(token) if token < SP_SIZE else str(token) for token in ids]


@pytest.mark.parametrize("legacy", [True, False])
def test_plain_text_is_tokenized_as_by_sentencepiece(tmp_path: Path, *, legacy: bool) -> None:
    tokenizer = backend(tmp_path, legacy=legacy)
    model = SentencePieceProcessor(model_proto=CONTENT)
    for text in ("USER: What is it?", "\nWhat", " two", "é", "a  b", ""):
        assert [token for token, _, _ in tokenizer.encode(text)] == model.encode(text, out_type=int), text


def test_only_legacy_mode_adds_a_space_after_special_tokens(tmp_path: Path) -> None:
    assert pieces(backend(tmp_path, legacy=True), "a</s>a")[1:] == ["</s>", *pieces(backend(tmp_path), "a")]
    assert pieces(backend(tmp_path, legacy=False), "a</s>a")[1:] == ["</s>", "a"]
    assert pieces(backend(tmp_path, legacy=False), "a</s> a")[1:] == ["</s>", *pieces(backend(tmp_path), "a")]


def test_no_space_is_added_before_a_leading_special_token(tmp_path: Path) -> None:
    assert pieces(backend(tmp_path, legacy=False), "</s>a") == ["</s>", "a"]
    assert pieces(backend(tmp_path, legacy=True), "</s>a") == ["</s>", *pieces(backend(tmp_path), "a")]


def test_only_special_tokens_with_a_role_drop_the_leading_space(tmp_path: Path) -> None:
    """Same as in transformers 4.37: a token that is merely marked special keeps the space."""
    end = {str(SP_SIZE): {"content": "<im_end>", "special": True}}
    assert pieces(backend(tmp_path, legacy=False, added_tokens_decoder=end), "<im_end>a") == ["▁", str(SP_SIZE), "a"]
    named = backend(tmp_path, legacy=False, added_tokens_decoder=end, additional_special_tokens=["<im_end>"])
    assert pieces(named, "<im_end>a") == [str(SP_SIZE), "a"]


def test_added_tokens_keep_their_ids_and_new_ones_follow(tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": SP_SIZE, "[PAD]": SP_SIZE + 1}))
    tokenizer = backend(tmp_path, pad_token="[PAD]")
    assert tokenizer.num_tokens == SP_SIZE + 2
    tokenizer.add_special("<im_start>")
    tokenizer.add_special("<im_end>")
    assert pieces(tokenizer, "<im_start><im_end>") == [str(SP_SIZE), str(SP_SIZE + 2)]
    assert {"<im_start>", "<im_end>", "[PAD]", "<s>", "</s>", "<unk>"} == tokenizer.special_texts


def test_bos_follows_the_configuration(tmp_path: Path) -> None:
    assert backend(tmp_path).bos_id == 1
    assert backend(tmp_path, add_bos_token=False).bos_id is None


@pytest.mark.parametrize("legacy", [True, False])
def test_offsets_are_in_characters_of_the_text(tmp_path: Path, *, legacy: bool) -> None:
    text = "USER: été?</s>ASSISTANT: two"
    tokens = backend(tmp_path, legacy=legacy).encode(text)
    assert "".join(text[start:end] for _, start, end in tokens) == text
    assert all(0 <= start <= end <= len(text) for _, start, end in tokens)


def test_decoding_leaves_special_tokens_out(tmp_path: Path) -> None:
    tokenizer = backend(tmp_path)
    ids = [token for token, _, _ in tokenizer.encode("USER: two red")]
    assert tokenizer.decode([1, *ids, 2, SP_SIZE + 50]) == "USER: two red"


@pytest.mark.parametrize("content", [b"", b"rubbish", CONTENT[:500]])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read"):
        SentencePieceBackend(tmp_path)


def test_an_id_after_a_gap_is_named(tmp_path: Path) -> None:
    tokenizer = backend(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": tokenizer.num_tokens + 3}))
    with pytest.raises(CheckpointError, match=r"gives <far> the id 403, but has only 401 tokens"):
        backend(tmp_path)
