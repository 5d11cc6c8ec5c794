"""Processes on the same cores share them, as processes start, pause or die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_core.stages import shared_cores
from llava_core.stages.shared_cores import SharedCores, shared_folder

OTHER = """
import sys
from pathlib import Path
from llava_core.stages.shared_cores import SharedCores
cores = SharedCores(Path(sys.argv[1]), 8, lambda threads: print("threads", threads, flush=True))
for line in sys.stdin:
    getattr(cores, line.strip())()
    print("done", flush=True)
"""


class Claimant:
    """This process's claim on the cores; it looks for other processes each time."""

    def __init__(self, folder: Path, num_cores: int = 8) -> None:
        self.threads: list[int] = []
        self.cores = SharedCores(folder, num_cores, self.threads.append)

    def claim(self) -> int:
        self.cores.claim()
        return self.threads[-1]


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores, "_LOOK_S", 0.0)


def test_a_single_process_gets_all_cores_and_is_notified_once(tmp_path: Path) -> None:
    claimant = Claimant(tmp_path)
    assert [claimant.claim(), claimant.claim()] == [8, 8]
    assert claimant.threads == [8]


def test_busy_processes_share_cores_and_idle_ones_do_not_count(tmp_path: Path) -> None:
    first, second, third = (Claimant(tmp_path) for _ in range(3))
    assert first.claim() == 8
    assert second.claim() == 4
    assert first.claim() == 4
    assert third.claim() == 2
    second.cores.release()
    assert third.claim() == 4
    first.cores.release()
    assert third.claim() == 8
    assert third.threads == [2, 4, 8]


def test_every_process_has_at_least_one_thread(tmp_path: Path) -> None:
    many = [Claimant(tmp_path, num_cores=2) for _ in range(4)]
    assert [claimant.claim() for claimant in many] == [2, 1, 1, 1]


def test_a_closed_claim_is_forgotten(tmp_path: Path) -> None:
    first, second = Claimant(tmp_path), Claimant(tmp_path)
    second.claim()
    assert first.claim() == 4
    second.cores.close()
    assert first.claim() == 8
    first.cores.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_the_share_of_a_dead_process_is_freed(tmp_path: Path, signal_number: int) -> None:
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        claimant = Claimant(tmp_path)
        assert claimant.claim() == 8
        print("claim", file=other.stdin, flush=True)
        assert other.stdout.readline() == "threads 4\n"
        assert other.stdout.readline() == "done\n"
        assert claimant.claim() == 4
        other.send_signal(signal_number)
        other.wait(timeout=30)
    assert claimant.claim() == 8
    # The next process to arrive cleans up.
    assert Claimant(tmp_path).claim() == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_the_shared_folder_belongs_to_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = shared_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shared_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    (tmp_path / f"llava-serve-{os.getuid()}").mkdir(mode=0o700)
    with pytest.raises(PermissionError, match="not a folder owned by this user"):
        shared_folder()


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "open to others"])
def test_a_shared_folder_open_to_others_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"llava-serve-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    if kind == "file":
        folder.touch(mode=0o700)
    elif kind == "open to others":
        folder.mkdir()
        folder.chmod(0o755)
    else:
        folder.symlink_to(elsewhere)
        if kind == "link":
            elsewhere.mkdir(mode=0o700)
    with pytest.raises(PermissionError, match="remove it"):
        shared_folder()
    assert not elsewhere.exists() or not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "-1", "0-00000000", "1.5-00000000", "12345678901234567890-00000000"])
def test_unrelated_files_are_ignored_and_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert Claimant(tmp_path).claim() == 8
    assert (tmp_path / name).exists()


def test_a_pid_reused_by_another_user_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_pid: int, _signal: int) -> None:
        raise PermissionError("another user's")

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / "17-00000000").touch()
    assert Claimant(tmp_path).claim() == 8
