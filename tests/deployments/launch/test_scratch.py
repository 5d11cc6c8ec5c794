"""Only folders that are no longer in use are removed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.launch.scratch import Scratch


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def _make_old(path: Path) -> None:
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))


def test_it_is_private_to_its_owner_and_removed_with_its_content() -> None:
    scratch = Scratch()
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    (scratch.path / "file").write_text("x")
    scratch.close()
    assert not scratch.path.exists()


def test_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    program = (
        "import tempfile, time; from deployments.launch.scratch import Scratch\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "scratch = Scratch(); print(scratch.path, flush=True); time.sleep(600)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().decode().strip())
        (left / "file").write_text("x")
        _make_old(left)
        Scratch().close()
        assert left.is_dir(), "it is in use"
        process.kill()
        process.wait()
    Scratch().close()
    assert not left.exists()


def test_new_folders_and_foreign_paths_are_kept(tmp_path: Path) -> None:
    new, link, file = (tmp_path / f"llava-serve-haproxy-{name}" for name in ("new", "link", "file"))
    new.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.symlink_to(elsewhere)
    file.write_text("x")
    _make_old(elsewhere)
    _make_old(file)
    Scratch().close()
    assert new.is_dir()
    assert link.is_symlink()
    assert elsewhere.is_dir()
    assert file.exists()
