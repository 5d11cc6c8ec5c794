"""How much memory is free: on a GPU, in the machine, or in the container that this process runs in."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: str) -> int:
    """Free bytes on a GPU, or, for the CPU, of the machine or the container this process runs in."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """cgroup v2's limit less the memory in use that cannot be reclaimed; the machine's total where there is no limit.

    Only pages on the file LRU lists can be reclaimed. `file` would also count shared memory, such as Ray's object
    store, which is freed only when its owner exits.
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
