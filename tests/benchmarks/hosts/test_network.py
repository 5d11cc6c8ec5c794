"""Simulated hosts on one machine: what each has for itself, what they share, and that they leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.hosts.network import Host, HostNetwork, HostsError, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable
# Answers each connection, for as long as it runs.
SERVER = """
import socket
listening = socket.create_server(("0.0.0.0", 7000))
while True:
    connection, _ = listening.accept()
    connection.sendall(b"hello")
    if connection.recv(1):
        connection.sendall(b"!")
"""
# Sends a byte once it is told that the link is cut, and waits for the answer.
TALK = """
import os, socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000))
assert connection.recv(5) == b"hello"
print("connected")
while not os.path.exists("/tmp/cut"):
    time.sleep(0.02)
connection.sendall(b"?")
print("sent")
assert connection.recv(1) == b"!"
print("heard")
"""
CLIENT = """
import contextlib, socket, sys
with contextlib.suppress(TimeoutError, ConnectionError):
    with socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2])) as connection:
        print(connection.recv(5).decode())
"""


def until(condition: Callable[[], object], deadline_s: float = 30) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[HostNetwork]:
    with HostNetwork(tmp_path, kept=[ROOT]) as network:
        yield network


def serve(host: Host) -> None:
    host.start([PYTHON, "-c", SERVER])
    until(lambda: ask(host, host))


def ask(host: Host, other: Host, patience_s: float = 0.5) -> bool:
    """Whether `other` answers in time."""
    return host.run([PYTHON, "-c", CLIENT, other.address, str(patience_s)]) == "hello\n"


def test_each_host_has_its_own_name_address_processes_and_files(network: HostNetwork) -> None:
    one, other = network.start_host("one"), network.start_host("other")
    assert one.address != other.address
    assert one.run(["cat", "/proc/sys/kernel/hostname"]) == "one\n"
    assert one.run(["sh", "-c", "echo mine > /tmp/file && echo mine > /dev/shm/file && cat /tmp/file"]) == "mine\n"
    assert (one.own / "file").read_text() == "mine\n"
    assert other.run(["sh", "-c", "ls /dev/shm"]) == ""
    assert "file" not in other.run(["ls", "/tmp"]).split()
    assert not Path("/dev/shm/file").exists()
    # Two processes: `sh`, and the init process.
    assert one.run(["sh", "-c", "echo /proc/[0-9]*"]).count("/proc/") == 2


def test_a_host_can_look_up_its_own_address(network: HostNetwork) -> None:
    host = network.start_host("one")
    find = (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('8.8.8.8', 1)); print(*s.getsockname())"
    )
    assert host.run([PYTHON, "-c", find]).split()[0] == host.address
    assert host.run([PYTHON, "-c", "import socket; print(socket.gethostbyname('one'))"]).strip() == host.address


def test_kept_folders_are_shared_by_all_hosts(network: HostNetwork) -> None:
    assert network.start_host("one").run(["ls", str(ROOT)]).split() == sorted(
        (each.name for each in ROOT.iterdir() if not each.name.startswith(".")), key=str
    )


def test_a_link_is_cut_between_two_hosts_only_and_restored(network: HostNetwork) -> None:
    one, other, third = (network.start_host(name) for name in ("one", "other", "third"))
    serve(other)
    assert ask(one, other)
    network.cut(one, other)
    assert not ask(one, other)
    assert ask(third, other)
    network.mend(one, other)
    assert ask(one, other, patience_s=10)


def test_a_connection_survives_a_cut(network: HostNetwork) -> None:
    one, other = network.start_host("one"), network.start_host("other")
    serve(other)
    one.start([PYTHON, "-uc", TALK, other.address], log="talk")
    until(lambda: (one.own / "talk").read_text() == "connected\n")
    network.cut(one, other)
    (one.own / "cut").touch()
    until(lambda: (one.own / "talk").read_text() == "connected\nsent\n")
    until(one.has_cut_connections)
    assert not other.has_cut_connections()
    network.mend(one, other)
    until(lambda: (one.own / "talk").read_text() == "connected\nsent\nheard\n")
    assert not one.has_cut_connections()


def test_an_unplugged_host_is_silent(network: HostNetwork) -> None:
    one, other = network.start_host("one"), network.start_host("other")
    serve(other)
    network.unplug(other)
    assert not ask(one, other)
    network.plug(other)
    assert ask(one, other, patience_s=10)


def test_a_killed_host_can_be_replaced(network: HostNetwork) -> None:
    one, other = network.start_host("one"), network.start_host("other")
    serve(other)
    pids = other.processes()
    assert pids
    other.kill()
    assert not other.is_alive
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not ask(one, other)
    again = network.start_host("other", other.address)
    assert again.own != other.own
    serve(again)
    assert ask(one, again, patience_s=10)


def test_some_processes_of_a_host_are_killed_by_their_command_line(network: HostNetwork) -> None:
    one, other = network.start_host("one"), network.start_host("other")
    for host in (one, other):
        host.start(["sleep", "1000"])
        host.start(["sleep", "2000"])
        until(lambda host=host: len(host.processes("sleep ")) == 2)  # type: ignore[misc]
    assert one.kill_processes("sleep 1000") == 1
    until(lambda: not one.processes("sleep 1000"))
    assert len(one.processes("sleep 2000")) == len(other.processes("sleep 1000")) == 1


def test_orphaned_processes_are_reaped(network: HostNetwork) -> None:
    host = network.start_host("one")
    host.run(["sh", "-c", "(sleep 0.05 &)"])
    until(lambda: host.run(["sh", "-c", "echo /proc/[0-9]*"]).count("/proc/") == 2)


def test_a_failing_or_slow_command_is_an_error_that_says_so(network: HostNetwork) -> None:
    host = network.start_host("one")
    with pytest.raises(HostsError, match=r"one: sh .* failed: .*nonsense"):
        host.run(["sh", "-c", "echo nonsense; exit 3"])
    with pytest.raises(HostsError, match=r"more than 0\.2 s"):
        host.run(["sleep", "60"], timeout_s=0.2)


PROGRAM = """
import sys, time
from pathlib import Path
from benchmarks.hosts.network import HostNetwork
with HostNetwork(Path(sys.argv[1])) as network:
    host = network.start_host("one")
    host.start(["sleep", "4321"])
    while not host.processes("sleep 4321"):
        time.sleep(0.02)
    print(host.pid, *host.processes("sleep 4321"), flush=True)
    time.sleep(1000)
"""


def test_hosts_end_with_their_creator_even_if_it_is_killed(tmp_path: Path) -> None:
    command = [PYTHON, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_the_machines_own_network_is_unchanged(tmp_path: Path) -> None:
    def links() -> list[str]:
        return sorted(os.listdir("/sys/class/net"))

    before = links()
    with contextlib.suppress(ZeroDivisionError), HostNetwork(tmp_path) as network:
        network.start_host("one")
        assert links() == before
        raise ZeroDivisionError
    assert links() == before
