"""A checkpoint that has been found is the same one wherever it is opened."""

from pathlib import Path

import pytest

from llava_core.checkpoints.found import FoundCheckpoint, find_checkpoint
from llava_core.errors import CheckpointError, UnknownNameError
from tests.hub import NEW, OLD, fill_cache, use_cache


def test_a_local_folder_is_used_directly(tiny_checkpoint: Path) -> None:
    found = find_checkpoint(str(tiny_checkpoint), offline=True)
    assert found == FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=True)
    assert found.open().folder == tiny_checkpoint


def test_an_unusable_checkpoint_fails_before_weights_are_read(checkpoint_copy: Path) -> None:
    with pytest.raises(UnknownNameError, match="vicuna_v1"):
        find_checkpoint(str(checkpoint_copy), template="nonsense")
    (checkpoint_copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        find_checkpoint(str(checkpoint_copy))


def test_an_id_is_opened_at_the_revision_that_was_found(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(monkeypatch, tmp_path)
    fill_cache(tmp_path, "owner/name", {OLD: tiny_checkpoint})
    found = find_checkpoint("owner/name", offline=True)
    fill_cache(tmp_path, "owner/name", {NEW: tiny_checkpoint})
    assert found.revisions == {"owner/name": OLD}
    assert OLD in str(found.open().folder)
