"""A file of JSON lines that grows a block of rows at a time, and has one writing process at a time.

Written rows are on disk and whole: a truncated line does not count. Of a row, it knows only the number.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.batch.errors import OutputError
from llava_core.disk import flush

Row = Mapping[str, Any]


class Journal:
    """A file of JSON lines that one process may append to. Anything after its last whole line is cut off."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError where the file cannot be written, or another job is writing it."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error
        if not _lock(self._file, path):
            os.close(self._file)
            raise OutputError(f"{path} is being written by another job; wait until it ends or name another output")
        self.num_bytes = os.fstat(self._file).st_size

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows that were written. Raises OutputError for a line that no job has written."""
        at = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                at += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("row"), int):
                    raise OutputError(f"{self._path}:{number} is damaged or not a job's row; name another output")
                yield row
        if at != self.num_bytes:
            self._cut(at)

    def append(self, rows: Iterable[Row]) -> None:
        """Write all of the rows or none, and flush them to disk. Raises OutputError; earlier rows stay."""
        data = b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows)
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, data[done:], self.num_bytes + done)
            if data:
                os.fsync(self._file)
        except OSError as error:
            self._cut(self.num_bytes)
            raise OutputError(
                f"{self._path} cannot be written: {error.strerror}; what was written before is whole. "
                "Make room and give the same command again"
            ) from error
        self.num_bytes += len(data)

    def drop(self, is_unwanted: Callable[[Row], bool]) -> list[int]:
        """Remove the unwanted rows and return their numbers. A file without them replaces this one; if the process dies
        meanwhile, one file or the other is left. Raises OutputError, and keeps this file."""
        dropped = [row["row"] for row in self.rows() if is_unwanted(row)]
        if not dropped:
            return []
        # The path may be a symbolic link.
        path = self._path.resolve()
        unwanted, temporary = set(dropped), path.with_name(f"{path.name}.tmp")
        try:
            with ExitStack() as until_it_is_there, path.open("rb") as whole, temporary.open("wb") as kept:
                until_it_is_there.callback(temporary.unlink, missing_ok=True)
                kept.writelines(line for line in whole if json.loads(line)["row"] not in unwanted)
                kept.flush()
                os.fsync(kept.fileno())
                file = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
                until_it_is_there.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.rename(path)
                flush(path.parent)
                until_it_is_there.pop_all()
        except OSError as error:
            raise OutputError(
                f"{temporary} cannot be written: {error.strerror}; {self._path} is as it was. "
                "Make room and give the same command again"
            ) from error
        os.close(self._file)
        self._file, self.num_bytes = file, os.fstat(file).st_size
        return dropped

    def clear(self) -> None:
        """Empty the file after its rows were moved elsewhere."""
        self._cut(0)

    def is_empty(self) -> bool:
        """Whether the file holds nothing, not even rows whose writing was interrupted."""
        return os.fstat(self._file).st_size == 0

    def close(self) -> None:
        """Release the file; another job may write from now on."""
        os.close(self._file)

    def _cut(self, at: int) -> None:
        os.ftruncate(self._file, at)
        self.num_bytes = at


def _lock(file: int, path: Path) -> bool:
    """Lock the file. Returns whether the lock is this process's and the path still leads to this file: its writer may
    have replaced it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
