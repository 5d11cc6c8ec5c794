"""Rows of different runs are told apart by their origin: input, model and settings."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.batch.errors import OutputError
from cluster.batch.manifest import Manifest, check_same, model_digest
from llava_core.checkpoints.layout import open_checkpoint
from tests.tiny import edit_json

ONE = Manifest(3, "input", "model", {"prompt": "What?", "sampling": {"temperature": 0.0, "stop": ()}})


def test_the_same_run_may_resume(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    check_same(file, ONE, is_new=True)
    check_same(file, ONE, is_new=False)


def test_every_difference_is_named_with_both_values(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    check_same(file, ONE, is_new=True)
    other = Manifest(4, "other", "model", {"prompt": None, "sampling": {"temperature": 0.7, "stop": ()}})
    with pytest.raises(OutputError) as raised:
        check_same(file, other, is_new=False)
    message = str(raised.value)
    for difference in (
        "input is another one",
        "num_rows was 3 and is 4",
        "prompt was 'What?' and is None",
        "sampling.temperature was 0.0 and is 0.7",
    ):
        assert difference in message
    assert "model" not in message


def test_rows_without_a_valid_manifest_are_not_appended_to(tmp_path: Path) -> None:
    for content in (None, "{broken"):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(OutputError, match="does not say which run"):
            check_same(tmp_path / "manifest.json", ONE, is_new=False)


def test_a_model_is_identified_by_its_files_not_their_location(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    digest = model_digest(open_checkpoint(tiny_checkpoint))
    assert model_digest(open_checkpoint(copy)) == digest
    (copy / "notes.log").write_text("of no matter")
    assert model_digest(open_checkpoint(copy)) == digest
    edit_json(copy / "preprocessor_config.json", lambda config: config.update(other=1))
    assert model_digest(open_checkpoint(copy)) != digest


@pytest.mark.parametrize("place", [-1, 200])
def test_changed_weights_change_the_digest(place: int, checkpoint_copy: Path) -> None:
    weights = checkpoint_copy / "model.safetensors"
    before = model_digest(open_checkpoint(checkpoint_copy))
    data = bytearray(weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[place if place < 0 else 8 + length + place] ^= 1
    weights.write_bytes(data)
    assert json.loads(bytes(data[8 : 8 + length]))
    assert model_digest(open_checkpoint(checkpoint_copy)) != before
