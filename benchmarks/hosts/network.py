"""Hosts on one machine, each with an address, processes, a name and a /tmp of its own, joined by a bridge.

Namespaces of Linux: root, or a user who may make user namespaces, and Debian's iproute2 and util-linux. The machine's
own network is neither used nor changed. Everything hangs on pipes to this process: when it ends, however it does, the
kernel ends every process of every host, and the links with them. Knows nothing of Ray.
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
# What `ss` shows of a connection's timer: how long it still runs, and how many times it has in vain.
_SENT_AGAIN = re.compile(r"timer:\(on,[^,]*,[1-9]")
# Nobody's: what is sent there is lost without a word, as on a cable that was cut.
_NOWHERE = "02:00:00:00:00:fe"

# A host's first process. It takes no part in anything: it collects orphans, by ignoring their ends, and ends with its
# standard input. `own` becomes /tmp, in which the folders that follow stay visible.
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
    """Hosts cannot be made here, or one did not do what it had to; the message says why."""


@dataclass(eq=False)
class Host:
    """`own` is its /tmp, as this process sees it; `pid` its first process, with which all others end."""

    name: str
    address: str
    own: Path
    pid: int
    _keeper: subprocess.Popen[bytes] = field(repr=False)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, log: str | None = None
    ) -> subprocess.Popen[bytes]:
        """A process in this host; what it prints goes into a file of this name in its /tmp, or nowhere.

        What is returned waits for it outside: to kill that leaves the process alone (see `kill_processes`)."""
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
        """Whether something that was sent during a cut is still to be sent again. TCP waits twice as long each time, so
        after a cut that may be for as long as it was."""
        return _SENT_AGAIN.search(self.run(["ss", "-Htno"])) is not None

    def run(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, timeout_s: float = 120
    ) -> str:
        """What a command prints in this host. Raises HostsError with that where it fails."""
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
        """Those whose command line holds `name`, its first one left out, as this process sees them."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.pid != self.pid
                if inside and name in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def kill_processes(self, name: str) -> int:
        """SIGKILL to those whose command line holds `name`; how many these were."""
        pids = self.processes(name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def kill(self) -> None:
        """SIGKILL to all its processes at once. Its kernel, which is ours, still closes their connections: to lose
        power, `HostNetwork.unplug` it before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for process in (self._keeper, *self._started):
            process.communicate(timeout=_PATIENCE_S)

    @property
    def is_alive(self) -> bool:
        """Whether there are still processes of it."""
        return self._keeper.poll() is None

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *_JOIN_USER, "--mount", "--uts", "--net", "--pid", "--"]


def _variables(environment: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "HOME": "/tmp", "TMPDIR": "/tmp", **(environment or {})}


# Whoever is not root becomes it in a user namespace.
_IS_ROOT = os.geteuid() == 0
_NEW_USER = () if _IS_ROOT else ("--user", "--map-root-user")
_JOIN_USER = () if _IS_ROOT else ("--user", "--preserve-credentials")


class HostNetwork:
    """A bridge, and the hosts on it. A context manager, at whose end nothing is left of it but files under `folder`.

    `kept` folders are the same in all hosts; all others below /tmp are each host's own."""

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
        """A host that boots; one of the same name and address after it is dead. Its /tmp is empty."""
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
            # Another host of this address has this one as well: nobody has to notice that it has changed.
            f"link set eth0 address 02:00:00:00:00:{int(address.rpartition('.')[2]):02x}",
            "link set eth0 up",
            # As on any network: an address of the world leads out of it, which is how programs find their own.
            f"route add default via {_GATEWAY}",
        ):
            host.run(["ip", *command.split()])
        return host

    def cut(self, one: Host, other: Host) -> None:
        """What either sends to the other is lost without a word; everybody else reaches both."""
        for host, peer in ((one, other), (other, one)):
            command = f"ip neigh replace {peer.address} lladdr {_NOWHERE} nud permanent dev eth0"
            host.run(command.split())

    def mend(self, one: Host, other: Host) -> None:
        """After `cut`."""
        for host, peer in ((one, other), (other, one)):
            host.run(f"ip neigh del {peer.address} dev eth0".split())

    def unplug(self, host: Host) -> None:
        """Nothing reaches it, and nobody is told."""
        self._ip(f"link set {_port(host)} down")

    def plug(self, host: Host) -> None:
        """After `unplug`."""
        self._ip(f"link set {_port(host)} up")

    def _ip(self, command: str) -> None:
        assert self._bridge is not None
        enter = ["nsenter", f"--target={self._bridge.pid}", *_JOIN_USER, "--net", "ip", *command.split()]
        done = subprocess.run(enter, capture_output=True, text=True)
        if done.returncode:
            raise HostsError(f"ip {command}: {done.stderr.strip()}")


@functools.cache
def why_not() -> str | None:
    """What is missing to make hosts here; None where they can be made."""
    missing = [name for name in ("ip", "ss", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: install Debian's iproute2 and util-linux"
    command = "mount -t tmpfs tmpfs /dev/shm && ip link add bridge type bridge && ip link add port type veth"
    spaces = [*_NEW_USER, "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc"]
    done = subprocess.run(["unshare", *spaces, "sh", "-c", command], capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def _keeper(*command: str) -> subprocess.Popen[bytes]:
    """A process that keeps namespaces, and whose standard input ends with this process. Returns when they are there.

    Raises HostsError."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != b"ready\n":
        reason = process.stderr.read().decode(errors="replace").strip()
        process.kill()
        process.wait()
        raise HostsError(f"no namespaces: {reason}; {why_not() or 'though others can be made'}")
    return process


def _port(host: Host) -> str:
    """The bridge's end of its link. Links of the dead go when the kernel gets round to it, so each has a name of its
    own."""
    return f"port{host.pid}"
