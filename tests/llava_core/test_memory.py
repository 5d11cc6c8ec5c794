"""Free memory of the machine, a container and a GPU."""

from pathlib import Path

import psutil
import pytest
import torch

from llava_core import memory
from llava_core.memory import available_bytes


def test_free_memory_does_not_exceed_the_machines_total() -> None:
    assert 0 < available_bytes("cpu") <= psutil.virtual_memory().total


# The kernel's names and arithmetic, from Documentation/admin-guide/cgroup-v2.rst: `file` is about the file lists plus
# `shmem`.
STAT = """anon 150000
file 300000
shmem 120000
inactive_anon 200000
active_anon 70000
inactive_file 110000
active_file 65000
unevictable 5000
"""


def write_cgroup(folder: Path, *, limit: str, stat: str = STAT) -> None:
    for name, text in (("memory.max", f"{limit}\n"), ("memory.current", "700000\n"), ("memory.stat", stat)):
        (folder / name).write_text(text)


def test_a_container_is_limited_and_shared_memory_is_not_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    write_cgroup(tmp_path, limit="1000000")
    assert available_bytes("cpu") == 1_000_000 - 700_000 + 110_000 + 65_000
    write_cgroup(tmp_path, limit="1000000", stat="anon 1\n")
    assert available_bytes("cpu") == 300_000
    write_cgroup(tmp_path, limit="max")
    assert available_bytes("cpu") > 500_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_free_memory_of_a_gpu_is_reported() -> None:
    assert 0 < available_bytes("cuda") <= torch.cuda.mem_get_info("cuda")[1]
