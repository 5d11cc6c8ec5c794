"""Hosts on one machine, each with its own address, processes, name and /tmp, joined by a bridge.

They are Linux namespaces, which need root, or a user who may create user namespaces, and Debian's iproute2 and
util-linux. The machine's own network is neither used nor changed. Every host depends on a pipe to this process: when it
ends, for whatever reason, the kernel ends every process of every host, and the links with them. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_NETWORK = "10.213.7"
_GATEWAY = f"{_NETWORK}.254"
_PATIENCE_S = 30.0
# The retransmission timer of a connection as `ss` shows it: time left, and number of retransmissions, at least 1.
_SENT_AGAIN = re.compile(r"timer:\(on,[^,]*,[1-9]")
# An unused hardware address: whatever is sent there is lost silently, as on a cut cable.
_NOWHERE = "02:00:00:00:00:fe"

# A host's init process. It only reaps orphans, by ignoring SIGCHLD, and ends with its standard input. `own` becomes
# /tmp, in which the folders given after it stay visible.
_INIT = """
set -e
own=$1 name=$2
shift 2
for kept in "$@"; do
    case $kept in /tmp/*)
        mkdir -p "$own/${kept#/tmp/}"
        mount --bind "$kept" "$own/${kept#/tmp/}"
    esac
done
mount --rbind "$own" /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind /tmp/hosts /etc/hosts
mount --bind /dev/null /etc/resolv.conf
echo "$name" > /proc/sys/kernel/hostname
echo ready
exec env --ignore-signal=CHLD cat > /dev/null
"""


class HostsError(Exception):
    """Hosts cannot be created here, or a host failed; the message says why."""


@dataclass(eq=False)
class Host:
    """`own` is its /tmp, as this process sees it; `pid` is its init process, with which all others end."""

    name: str
    address: str
    own: Path
    pid: int
    _keeper: subprocess.Popen[bytes] = field(repr=False)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, log: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in this host; its output goes into the file `log` in its /tmp, or nowhere.

        The returned process only waits for it outside: killing that does not kill the process itself (see
        `kill_processes`)."""
        with open(self.own / log if log else os.devnull, "ab") as output:
            process = subprocess.Popen(
                [*self._enter(), *command],
                env=_variables(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._started.append(process)
        return process

    def has_cut_connections(self) -> bool:
        """Whether data sent during a cut still awaits retransmission. TCP doubles its wait each time, so this may last
        as long after a cut as the cut itself."""
        return _SENT_AGAIN.search(self.run(["ss", "-Htno"])) is not None

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout_s: float = 120
    ) -> str:
        """Run a command in this host and return its standard output. Raises HostsError with its output if it fails."""
        try:
            done = subprocess.run(
                [*self._enter(), *command],
                env=_variables(environment),
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise HostsError(f"{self.name}: {' '.join(command)} takes more than {timeout_s:g} s") from None
        if done.returncode:
            raise HostsError(f"{self.name}: {' '.join(command)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def processes(self, name: str = "") -> list[int]:
        """Return the pids, as this process sees them, of the host's processes whose command line contains `name`,
        except for its init."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.pid != self.pid
                if inside and name in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def kill_processes(self, name: str) -> int:
        """Send SIGKILL to the processes whose command line contains `name`; returns how many there were."""
        pids = self.processes(name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def kill(self) -> None:
        """Send SIGKILL to all processes of the host at once. Its kernel, which is ours, still closes their connections:
        to simulate a power loss, call `HostNetwork.unplug` first."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for process in (self._keeper, *self._started):
            process.communicate(timeout=_PATIENCE_S)

    @property
    def is_alive(self) -> bool:
        """Whether any of its processes are left."""
        return self._keeper.poll() is None

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *_JOIN_USER, "--mount", "--uts", "--net", "--pid", "--"]


def _variables(environment: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "HOME": "/tmp", "TMPDIR": "/tmp", **(environment or {})}


# Other users become root in a user namespace.
_IS_ROOT = os.geteuid() == 0
_NEW_USER = () if _IS_ROOT else ("--user", "--map-root-user")
_JOIN_USER = () if _IS_ROOT else ("--user", "--preserve-credentials")


class HostNetwork:
    """A bridge, and the hosts on it. A context manager that leaves nothing behind but files under `folder`.

    `kept` folders are shared by all hosts; all others below /tmp are private to each host."""

    def __init__(self, folder: Path, kept: Sequence[Path] = ()) -> None:
        self._folder = folder
        self._kept = kept
        self._hosts: dict[str, Host] = {}
        self._bridge: subprocess.Popen[bytes] | None = None
        self._num_started = 0

    def __enter__(self) -> HostNetwork:
        self._bridge = _keeper("unshare", *_NEW_USER, "--net", "sh", "-c", "echo ready; exec cat > /dev/null")
        self._ip("link add bridge type bridge")
        self._ip(f"address add {_GATEWAY}/24 dev bridge")
        self._ip("link set bridge up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self._hosts.values():
            host.kill()
        if self._bridge is not None:
            self._bridge.kill()
            self._bridge.communicate(timeout=_PATIENCE_S)

    def start_host(self, name: str, address: str | None = None) -> Host:
        """Boot a host, with an empty /tmp. Once a host is dead, another may take its name and address."""
        self._num_started += 1
        number = self._num_started
        address = address or f"{_NETWORK}.{number}"
        own = self._folder / f"{name}-{number}"
        own.mkdir(parents=True)
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        assert self._bridge is not None, "hosts are started in the block of their network"
        spaces = ["--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        join = () if _IS_ROOT else ("nsenter", f"--target={self._bridge.pid}", *_JOIN_USER)
        keeper = _keeper(*join, "unshare", *spaces, "sh", "-c", _INIT, "init", str(own), name, *map(str, self._kept))
        [init] = psutil.Process(keeper.pid).children()
        host = Host(name, address, own, init.pid, keeper)
        self._hosts[name] = host
        self._ip(f"link add {_port(host)} type veth peer name eth0 netns {host.pid}")
        self._ip(f"link set {_port(host)} master bridge up")
        for command in (
            "link set lo up",
            f"address add {address}/24 dev eth0",
            # A successor with this IP address gets the same hardware address, so no peer's ARP entry becomes stale.
            f"link set eth0 address 02:00:00:00:00:{int(address.rpartition('.')[2]):02x}",
            "link set eth0 up",
            # A default route, as on any network: programs find their own address by routing to an outside one.
            f"route add default via {_GATEWAY}",
        ):
            host.run(["ip", *command.split()])
        return host

    def cut(self, one: Host, other: Host) -> None:
        """Silently drop all packets between two hosts; everybody else still reaches both."""
        for host, peer in ((one, other), (other, one)):
            command = f"ip neigh replace {peer.address} lladdr {_NOWHERE} nud permanent dev eth0"
            host.run(command.split())

    def mend(self, one: Host, other: Host) -> None:
        """Undo `cut`."""
        for host, peer in ((one, other), (other, one)):
            host.run(f"ip neigh del {peer.address} dev eth0".split())

    def unplug(self, host: Host) -> None:
        """Cut a host off silently from everything."""
        self._ip(f"link set {_port(host)} down")

    def plug(self, host: Host) -> None:
        """Undo `unplug`."""
        self._ip(f"link set {_port(host)} up")

    def _ip(self, command: str) -> None:
        assert self._bridge is not None
        enter = ["nsenter", f"--target={self._bridge.pid}", *_JOIN_USER, "--net", "ip", *command.split()]
        done = subprocess.run(enter, capture_output=True, text=True)
        if done.returncode:
            raise HostsError(f"ip {command}: {done.stderr.strip()}")


@functools.cache
def why_not() -> str | None:
    """Return what is missing to create hosts here; None where they can be created."""
    missing = [name for name in ("ip", "ss", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: install Debian's iproute2 and util-linux"
    command = "mount -t tmpfs tmpfs /dev/shm && ip link add bridge type bridge && ip link add port type veth"
    spaces = [*_NEW_USER, "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc"]
    done = subprocess.run(["unshare", *spaces, "sh", "-c", command], capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def _keeper(*command: str) -> subprocess.Popen[bytes]:
    """Start a process that holds namespaces, and whose standard input closes when this process ends. Returns when the
    namespaces exist. Raises HostsError."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != b"ready\n":
        reason = process.stderr.read().decode(errors="replace").strip()
        process.kill()
        process.wait()
        raise HostsError(f"no namespaces: {reason}; {why_not() or 'although others can be created'}")
    return process


def _port(host: Host) -> str:
    """Return the name of the bridge's end of a host's link. The kernel removes links of dead hosts with a delay, so
    each host's name is unique."""
    return f"port{host.pid}"
