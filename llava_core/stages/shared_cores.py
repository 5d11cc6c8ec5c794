"""How many threads to compute with while other stages compute on the same cores.

Two networks that each have a thread on every core wait, at every operation, for a thread that is not running, and
together do less than either alone. So each process announces when it is busy, and each busy one takes its share of the
cores. No process waits for another. Knows no networks and no Ray: the processes of a machine see each other through
locks on files, which the system releases when a process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

# Seconds between checks for new processes.
_LOOK_S = 1.0
# A process id and random digits; ids end at 2**22.
_NAME = re.compile(r"[1-9][0-9]{0,6}-[0-9a-f]{8}")


class Cores(Protocol):
    """What a network announces to the processes that share its cores; used by one thread only."""

    def claim(self) -> None:
        """There is something to compute; called again before every part of it."""
        ...

    def release(self) -> None:
        """There is nothing to compute."""
        ...


class OwnCores:
    """Cores that are not shared: nothing needs to be announced."""

    def claim(self) -> None:
        """As Cores.claim."""

    def release(self) -> None:
        """As Cores.release."""


class SharedCores:
    """This process's share among all that use the same `folder`. `set_threads` is called whenever the share changes."""

    def __init__(self, folder: Path, num_cores: int, set_threads: Callable[[int], None]) -> None:
        self._folder = folder
        self._num_cores = num_cores
        self._set_threads = set_threads
        self._num_threads = 0
        self._path = folder / f"{os.getpid()}-{os.urandom(4).hex()}"
        self._own = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._others: dict[str, int] = {}
        self._looked = -_LOOK_S
        self._is_busy = False

    def claim(self) -> None:
        """Announce that this process is computing, and update its share. Costs microseconds: call it often."""
        if not self._is_busy:
            fcntl.flock(self._own, fcntl.LOCK_EX)
            self._is_busy = True
        if time.monotonic() - self._looked >= _LOOK_S:
            self._look()
        share = max(1, self._num_cores // (1 + sum(map(_is_locked, self._others.values()))))
        if share != self._num_threads:
            self._num_threads = share
            self._set_threads(share)

    def release(self) -> None:
        """Announce that this process has nothing to compute."""
        self._is_busy = False
        fcntl.flock(self._own, fcntl.LOCK_UN)

    def close(self) -> None:
        """Remove this process's file and close all files."""
        self._path.unlink(missing_ok=True)
        for file in (self._own, *self._others.values()):
            os.close(file)
        self._others.clear()

    def _look(self) -> None:
        self._looked = time.monotonic()
        found = {path.name for path in self._folder.iterdir()} - {self._path.name}
        names = {name for name in found if _NAME.fullmatch(name)}
        for name in self._others.keys() - names:
            os.close(self._others.pop(name))
        for name in names - self._others.keys():
            try:
                file = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):
                continue
            if _is_alive(name):
                self._others[name] = file
            else:
                os.close(file)
                (self._folder / name).unlink(missing_ok=True)


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _is_alive(name: str) -> bool:
    """Whether the process that created the file still exists; otherwise the file is obsolete."""
    try:
        os.kill(int(name.partition("-")[0]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Another user's process has the id now. Whether the file counts depends on its lock.
        pass
    return True


def shared_folder() -> Path:
    """The folder shared by this user's processes on this machine. Raises PermissionError if others have access."""
    folder = Path(tempfile.gettempdir()) / f"llava-serve-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    # lstat, not stat: another user's link under this name would decide where we write.
    status = folder.lstat()
    is_folder, permissions = stat.S_ISDIR(status.st_mode), status.st_mode & 0o777
    if not is_folder or status.st_uid != os.getuid() or permissions != 0o700:
        raise PermissionError(f"{folder} is not a folder owned by this user with mode 0700; remove it")
    return folder
