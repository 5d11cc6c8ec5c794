"""Processes below this one are found, waited for and ended."""

import os
import subprocess
import sys
import time

from deployments.launch.processes import descendants, end

NESTED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def _start_two() -> subprocess.Popen[bytes]:
    """Start a process with a child."""
    before = descendants(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", NESTED])
    deadline = time.monotonic() + 10
    while len(descendants(os.getpid()) - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_grandchildren_are_found_and_ended() -> None:
    before = descendants(os.getpid())
    process = _start_two()
    begun = descendants(os.getpid()) - before
    assert len(begun) == 2
    end(begun, patience_s=0.0)
    process.wait(10)
    assert not descendants(os.getpid()) - before


def test_a_process_that_ends_by_itself_is_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    begun = {each for each in descendants(os.getpid()) if each.pid == process.pid}
    started = time.monotonic()
    end(begun, patience_s=10.0)
    assert time.monotonic() - started < 5
    assert process.wait(10) == 0


def test_a_process_that_has_ended_is_not_a_descendant() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 10
    while any(each.pid == process.pid for each in descendants(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(each.pid == process.pid for each in descendants(os.getpid()))
    process.wait(10)


def test_killed_processes_are_gone_when_end_returns() -> None:
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        begun = {each for each in descendants(os.getpid()) if each.pid == process.pid}
        end(begun, patience_s=0.0)
        assert not begun & descendants(os.getpid())
        process.wait(10)


def test_descendants_of_several_processes_are_found_together() -> None:
    process = _start_two()
    [grandchild] = descendants(process.pid)
    assert descendants(process.pid, grandchild.pid) == {grandchild}
    end({grandchild, *(each for each in descendants(os.getpid()) if each.pid == process.pid)}, patience_s=0.0)
    process.wait(10)
