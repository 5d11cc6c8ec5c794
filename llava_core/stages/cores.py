"""How many cores this process may use: as many as the scheduler allows, or fewer where a container has a quota.

Every source is used where the system has it. Standard library only.
"""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """The number of cores this process may use, at least 1."""
    if hasattr(os, "process_cpu_count"):
        allowed = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count()
    # A fraction of a core is best used by one thread.
    return max(1, math.ceil(min(allowed or 1, quota())))


def quota(root: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> float:
    """The cgroup v2 CPU quota in cores: the least of this group's and its parents'; infinite where there is none."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    # Version 2 is the line `0::/path`; a container sees its own group as the root.
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if path is None:
        return math.inf
    group = PurePosixPath(path)
    return min(_read_quota(root / parent / "cpu.max") for parent in (group, *group.parents))


def _read_quota(file: Path) -> float:
    try:
        allowance, period = file.read_text(encoding="utf-8").split()
    except OSError:
        return math.inf
    return math.inf if allowance == "max" else int(allowance) / int(period)
