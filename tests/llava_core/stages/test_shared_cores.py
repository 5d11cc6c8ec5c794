"""Processes that compute on the same cores share them, whoever comes, pauses or dies."""

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


class Here:
    """This process, which looks for others each time."""

    def __init__(self, folder: Path, num_cores: int = 8) -> None:
        self.threads: list[int] = []
        self.cores = SharedCores(folder, num_cores, self.threads.append)

    def claim(self) -> int:
        self.cores.claim()
        return self.threads[-1]


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores, "_LOOK_S", 0.0)


def test_who_is_alone_has_all_cores_and_is_told_once(tmp_path: Path) -> None:
    here = Here(tmp_path)
    assert [here.claim(), here.claim()] == [8, 8]
    assert here.threads == [8]


def test_who_is_busy_together_shares_and_who_is_idle_counts_for_nothing(tmp_path: Path) -> None:
    first, second, third = (Here(tmp_path) for _ in range(3))
    assert first.claim() == 8
    assert second.claim() == 4
    assert first.claim() == 4
    assert third.claim() == 2
    second.cores.release()
    assert third.claim() == 4
    first.cores.release()
    assert third.claim() == 8
    assert third.threads == [2, 4, 8]


def test_nobody_has_less_than_one_thread(tmp_path: Path) -> None:
    many = [Here(tmp_path, num_cores=2) for _ in range(4)]
    assert [here.claim() for here in many] == [2, 1, 1, 1]


def test_who_leaves_is_forgotten(tmp_path: Path) -> None:
    first, second = Here(tmp_path), Here(tmp_path)
    second.claim()
    assert first.claim() == 4
    second.cores.close()
    assert first.claim() == 8
    first.cores.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_takes_no_share_with_it(tmp_path: Path, signal_number: int) -> None:
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        here = Here(tmp_path)
        assert here.claim() == 8
        print("claim", file=other.stdin, flush=True)
        assert other.stdout.readline() == "threads 4\n"
        assert other.stdout.readline() == "done\n"
        assert here.claim() == 4
        other.send_signal(signal_number)
        other.wait(timeout=30)
    assert here.claim() == 8
    # Whoever comes next clears up.
    assert Here(tmp_path).claim() == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_is_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = shared_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert shared_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    (tmp_path / f"llava-serve-{os.getuid()}").mkdir(mode=0o700)
    with pytest.raises(PermissionError, match="not a folder owned by this user"):
        shared_folder()


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "open to others"])
def test_what_others_could_have_made_or_could_enter_is_not_the_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_files_of_others_count_for_nothing_and_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert Here(tmp_path).claim() == 8
    assert (tmp_path / name).exists()


def test_a_number_that_another_users_process_has_now_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(_pid: int, _signal: int) -> None:
        raise PermissionError("another user's")

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / "17-00000000").touch()
    assert Here(tmp_path).claim() == 8
