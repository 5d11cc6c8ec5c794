"""Permission errors name the folder that cannot be read: the checkpoint's own, or a parent that may not be entered."""

import os
from pathlib import Path

import pytest

from llava_core.checkpoints.access import check_access
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.errors import CheckpointError


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the user may not enter, even if root runs the tests."""
    folder, allowed = tmp_path / "locked", os.access
    (folder / "model").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    return folder


def test_the_unreadable_folder_or_parent_is_named(locked: Path) -> None:
    for path in (locked, locked / "model", locked / "no" / "model"):
        with pytest.raises(CheckpointError, match=f"^{locked} cannot be read: permission denied; give"):
            check_access(path)
    check_access(locked.parent)


@pytest.mark.parametrize("name", ["none", "a\0b", "x" * 5000, ""])
def test_a_missing_folder_is_not_reported_as_denied(tmp_path: Path, name: str) -> None:
    check_access(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "x" * 5000 + "/y"])
def test_an_impossible_folder_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder here|no such checkpoint folder"):
        open_checkpoint(name, offline=True)


def test_an_unreadable_file_is_named(checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: permission denied"):
        open_checkpoint(checkpoint_copy)
