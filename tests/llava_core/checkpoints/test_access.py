"""What may not be read is named: the folder itself, or the one on the way that nobody may enter."""

import os
from pathlib import Path

import pytest

from llava_core.checkpoints.access import check_access
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.errors import CheckpointError


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this user may not enter, whoever runs the tests."""
    folder, allowed = tmp_path / "locked", os.access
    (folder / "model").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    return folder


def test_a_folder_and_one_on_the_way_are_named(locked: Path) -> None:
    for path in (locked, locked / "model", locked / "no" / "model"):
        with pytest.raises(CheckpointError, match=f"^{locked} cannot be read: permission denied; give"):
            check_access(path)
    check_access(locked.parent)


@pytest.mark.parametrize("name", ["none", "a\0b", "x" * 5000, ""])
def test_what_is_not_there_is_not_denied(tmp_path: Path, name: str) -> None:
    check_access(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "x" * 5000 + "/y"])
def test_a_name_that_no_folder_can_have_is_no_checkpoint(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder here|no such checkpoint folder"):
        open_checkpoint(name, offline=True)


def test_files_without_permission_are_named(checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: permission denied"):
        open_checkpoint(checkpoint_copy)
