"""A journal has one writer, even when the file is replaced by one without the dropped rows."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cluster.batch.errors import OutputError
from cluster.batch.journal import Journal


def journal(path: Path, *numbers: int) -> Journal:
    opened = Journal(path)
    opened.append([{"row": number} for number in numbers])
    return opened


def numbers_of(path: Path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


def test_dropped_rows_are_removed_and_others_may_follow(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path, 3, 1, 2)
    assert opened.drop(lambda row: row["row"] == 1) == [1]
    opened.append([{"row": 7}])
    opened.close()
    assert numbers_of(path) == [3, 2, 7]
    assert [*tmp_path.iterdir()] == [path]


def test_a_symbolic_link_is_preserved(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    opened = journal(tmp_path / "link.jsonl", 0, 1)
    opened.drop(lambda row: row["row"] == 1)
    assert (tmp_path / "link.jsonl").is_symlink()
    assert numbers_of(tmp_path / "a.jsonl") == [0]


def test_a_replaced_file_is_locked_before_it_gets_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path, 0, 1)
    opened.drop(lambda row: row["row"] == 1)
    with pytest.raises(OutputError, match="is being written by another job"):
        Journal(path)
    opened.close()
    Journal(path).close()


def test_opening_a_file_that_is_replaced_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    first, real = journal(path, 0, 1), fcntl.flock

    def replaced_before(file: int, how: int) -> None:
        monkeypatch.undo()
        first.drop(lambda row: row["row"] == 1)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with pytest.raises(OutputError, match="is being written by another job"):
        Journal(path)


def test_a_full_disk_leaves_the_journal_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    opened = journal(path, 0, 1)

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"No space left on device; .*a\.jsonl is as it was"):
            opened.drop(lambda row: row["row"] == 1)
    assert numbers_of(path) == [0, 1]
    assert [*tmp_path.iterdir()] == [path]
