"""How much memory is free: on a GPU, in the machine, or in the container that this process runs in."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: str) -> int:
    """What is free on a GPU; on the CPU what the machine, or the container this process is in, has left."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """cgroup v2's limit less what is used and cannot be dropped; all there is where there is no limit.

    What can be dropped is the pages on the lists of files. `file` counts shared memory as well, Ray's object store
    among it, which only goes when its owner goes.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return psutil.virtual_memory().total
    if limit == "max":
        return psutil.virtual_memory().total
    return int(limit) - used + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
