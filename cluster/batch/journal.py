"""A file of JSON lines that grows a block of rows at a time, and of which one process at once is the writer.

What was written is on the disk, and whole: a line that was cut off is none. Knows of a row its number alone.
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
    """A file of JSON lines that one process may append to. What stands behind its last whole line is cut off."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError where it cannot be written, or another job does so."""
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from error
        if not _lock(self._file, path):
            os.close(self._file)
            raise OutputError(f"{path} is being written by another job; wait for its end or name another output")
        self.num_bytes = os.fstat(self._file).st_size

    def rows(self) -> Iterator[dict[str, Any]]:
        """All that were written. Raises OutputError for a line that no job has written."""
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
                    raise OutputError(f"{self._path}:{number} is damaged or no job's; name another output")
                yield row
        if at != self.num_bytes:
            self._cut(at)

    def append(self, rows: Iterable[Row]) -> None:
        """All of them or none, onto the disk. Raises OutputError; what was there before stays."""
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
        """Leave out such rows, and give their numbers. A file without them takes the place of this one; what ends the
        process leaves one or the other. Raises OutputError, and leaves this one."""
        dropped = [row["row"] for row in self.rows() if is_unwanted(row)]
        if not dropped:
            return []
        # The name may be a link.
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
        """After its rows went elsewhere."""
        self._cut(0)

    def is_empty(self) -> bool:
        """Of anything, also of rows whose writing was interrupted."""
        return os.fstat(self._file).st_size == 0

    def close(self) -> None:
        """Another job may write from now on."""
        os.close(self._file)

    def _cut(self, at: int) -> None:
        os.ftruncate(self._file, at)
        self.num_bytes = at


def _lock(file: int, path: Path) -> bool:
    """Whether the file is this process's, and still has the name: its writer may have put another in its place."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
