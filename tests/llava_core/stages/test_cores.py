"""Usable cores: what the scheduler allows, limited by a container's quota."""

import math
import os
from pathlib import Path

import pytest

from llava_core.stages import cores
from llava_core.stages.cores import quota, usable_cores


def _groups(folder: Path, own: str, **files: str) -> tuple[Path, Path]:
    (folder / "own").write_text(own)
    for group, content in files.items():
        path = folder / "fs" / group.replace("_", "/") if group != "root" else folder / "fs"
        path.mkdir(parents=True, exist_ok=True)
        (path / "cpu.max").write_text(content)
    return folder / "fs", folder / "own"


def test_without_a_quota_the_quota_is_infinite(tmp_path: Path) -> None:
    assert quota(tmp_path, tmp_path / "nothing") == math.inf
    assert quota(*_groups(tmp_path, "4:cpu:/x\n")) == math.inf
    assert quota(*_groups(tmp_path, "0::/a\n", a="max 100000\n")) == math.inf


def test_the_lowest_quota_of_a_group_and_its_parents_applies(tmp_path: Path) -> None:
    assert quota(*_groups(tmp_path, "0::/a/b\n", a="150000 100000", a_b="400000 100000")) == 1.5
    assert quota(*_groups(tmp_path, "0::/\n", root="50000 100000")) == 0.5


def test_a_fraction_of_a_core_counts_as_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = len(os.sched_getaffinity(0))
    for share, expected in ((0.5, 1), (math.inf, allowed), (allowed - 0.5, allowed)):
        monkeypatch.setattr(cores, "quota", lambda share=share: share)
        assert usable_cores() == expected


def test_without_affinity_all_cores_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(cores, "quota", lambda: math.inf)
    assert usable_cores() == 3
