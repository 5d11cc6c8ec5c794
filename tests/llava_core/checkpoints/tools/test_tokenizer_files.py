"""The tokenizer of a converted original: the original's ids and BOS, and `<image>` in the first free row."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.checkpoints.tools.tokenizer_files import changed_tokens, with_image_token
from llava_core.errors import CheckpointError
from tests.original import SP_SIZE, Kind, write_json, write_original
from tests.tiny import edit_json

TEXTS = ["USER: What is it?", "\nhi  there", "é中\t", " ASSISTANT: two red circles"]


@pytest.mark.parametrize("kind", [Kind(), Kind(tokenizer="slow"), Kind(decoder="mistral")])
def test_texts_have_the_same_ids_and_bos(tmp_path: Path, kind: Kind) -> None:
    checkpoint = open_checkpoint(write_original(tmp_path, kind).folder)
    theirs = load_tokenizer(checkpoint)
    made, image = with_image_token(checkpoint)
    made.save_pretrained(tmp_path / "saved")
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    for text in TEXTS[:2] if kind.tokenizer == "slow" else TEXTS:
        expected = [token for token, _, _ in theirs.encode(text)]
        assert saved(text)["input_ids"] == [theirs.bos_id, *expected]
    assert saved.convert_tokens_to_ids("<image>") == image
    assert saved("a<image>b")["input_ids"].count(image) == 1
    assert saved.pad_token is not None


def test_the_image_token_takes_the_first_free_row(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_original(tmp_path, Kind(tokenizer="slow", pad_rows=3)).folder)
    made, image = with_image_token(checkpoint)
    assert (image, len(made)) == (SP_SIZE, SP_SIZE + 1)


def test_a_tokenizer_without_bos_stays_without(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(tokenizer="slow"))
    edit_json(original.folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=False))
    made, _ = with_image_token(open_checkpoint(original.folder))
    assert made("USER")["input_ids"][0] != 1


@pytest.mark.parametrize("kind", [Kind(), Kind(tokenizer="slow", pad_rows=3)])
def test_added_tokens_are_found_but_not_the_image_token(tmp_path: Path, kind: Kind) -> None:
    original = write_original(tmp_path, kind)
    made, _ = with_image_token(open_checkpoint(original.folder))
    made.save_pretrained(tmp_path / "made")
    assert changed_tokens(original.folder, tmp_path / "made") == []
    made.add_tokens(["<b>", "<a>"])
    made.save_pretrained(tmp_path / "made")
    assert changed_tokens(original.folder, tmp_path / "made") == ["<a>", "<b>"]


@pytest.mark.parametrize(("tokenizer", "file"), [("fast", "tokenizer.json"), ("slow", "tokenizer.model")])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, tokenizer: str, file: str) -> None:
    original = write_original(tmp_path, Kind(tokenizer=tokenizer))
    (original.folder / file).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{original.folder}/{file} cannot be read"):
        with_image_token(open_checkpoint(original.folder))


def test_a_mismatched_and_a_missing_tokenizer_are_named(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    edit_json(original.folder / "config.json", lambda config: config.update(vocab_size=9))
    with pytest.raises(CheckpointError, match="the tokenizer has 260 tokens, but config"):
        with_image_token(open_checkpoint(original.folder))
    (original.folder / "tokenizer.json").unlink()
    write_json(original.folder / "tokenizer_config.json", {})
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        with_image_token(open_checkpoint(original.folder))
