"""Flushing files and folders to disk."""

import os
from pathlib import Path

import pytest

from llava_core.disk import flush


def test_the_named_file_or_folder_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "written"
    file.write_text("words")
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    flush(file)
    flush(tmp_path)
    assert flushed == [file.stat().st_ino, tmp_path.stat().st_ino]


def test_no_file_stays_open_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.fsync", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no room"):
        flush(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
