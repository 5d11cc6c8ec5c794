"""The descendants of a process, from Linux's /proc, so that whoever starts many can wait for the last of them to end.

On other systems none are found. Standard library only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)
_POLL_S, _KILL_PATIENCE_S = 0.05, 10.0


class Process(NamedTuple):
    """A process, told apart by its start time from a later one with the same number."""

    pid: int
    started: str


def descendants(*roots: int) -> set[Process]:
    """Children, their children and so on, without zombies."""
    stats = {stat.pid: stat for stat in map(_stat, _pids()) if stat is not None}
    found: set[Process] = set()
    parents = set(roots)
    while parents:
        children = {stat for stat in stats.values() if stat.parent in parents}
        found |= {Process(stat.pid, stat.started) for stat in children if not stat.has_ended}
        parents = {stat.pid for stat in children}
    return found


def name_of(process: Process) -> str:
    """The process's name, at most 15 characters; "" once it has ended."""
    try:
        return Path(f"/proc/{process.pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def end(processes: Iterable[Process], *, patience_s: float) -> None:
    """Return when all processes have ended; kills those left after `patience_s`."""
    left = _wait(list(processes), patience_s)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    for process in _wait(left, _KILL_PATIENCE_S):
        logger.warning("process %d was killed and is still there", process.pid)


def _wait(processes: list[Process], patience_s: float) -> list[Process]:
    """The processes that are still alive after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while (processes := [each for each in processes if _is_alive(each)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return processes


class _Stat(NamedTuple):
    pid: int
    parent: int
    started: str
    has_ended: bool


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the name in brackets, which may hold anything.
    fields = text.rpartition(")")[2].split()
    return _Stat(pid, int(fields[1]), fields[19], has_ended=fields[0] in "ZX")


def _is_alive(process: Process) -> bool:
    stat = _stat(process.pid)
    return stat is not None and stat.started == process.started and not stat.has_ended
