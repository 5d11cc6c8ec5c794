"""Faults of a cluster under load: what is injected, what clients saw of it, and how long recovery took.

Each fault hits a complete cluster and leaves a complete one behind. Knows hosts, and of the service only where each
stage runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.hosts.cluster import PORT, ROOT, HostCluster, until
from benchmarks.hosts.load import Asked, read_outcomes
from benchmarks.hosts.network import Host, HostsError

# After a longer silence than this within an answer, a client would suspect that something is wrong.
NOTICED_S = 2.0
_MOST_S = 240.0
_POLL_S = 0.25


@dataclass(frozen=True)
class Seen:
    """What clients saw from the fault on: requests, how many failed and how, answers that differ from those of an
    undisturbed run, and, of requests that did not fail, the longest silence and the longest wait for a first token.

    `recovered_s` is when the last client had a complaint, `complete_s` when all replicas were back, None where that was
    not waited for.
    """

    requests: int
    failed: dict[str, int]
    wrong: int
    longest_gap_s: float
    longest_wait_s: float
    recovered_s: float
    complete_s: float | None = None


def see(outcomes: Sequence[Asked], struck: float, complete_s: float | None = None) -> Seen:
    """Summarise a load during which a fault struck at `struck`."""
    after = [asked for asked in outcomes if asked.ended > struck]
    lasted = [asked for asked in after if not asked.has_failed]
    return Seen(
        requests=len(after),
        failed=dict(Counter(asked.error for asked in after if asked.has_failed)),
        wrong=_num_wrong(outcomes),
        longest_gap_s=round(max((asked.gap_s for asked in lasted), default=0.0), 2),
        longest_wait_s=round(max((asked.first_s for asked in lasted), default=0.0), 2),
        recovered_s=round(max([0.0, *(when - struck for when in complaints(outcomes, struck))]), 2),
        complete_s=complete_s,
    )


def complaints(outcomes: Sequence[Asked], struck: float) -> list[float]:
    """Return when clients had a complaint after the fault: a request that failed, or was silent for too long."""
    after = [asked for asked in outcomes if asked.ended > struck]
    failed = [asked.ended for asked in after if asked.has_failed]
    silent = [asked.gap_ended for asked in after if asked.gap_s > NOTICED_S and asked.gap_ended > struck]
    return failed + silent + [asked.began + asked.first_s for asked in after if asked.first_s > NOTICED_S]


def _num_wrong(outcomes: Sequence[Asked]) -> int:
    """Count the answers, whole or partial, that differ from the most common answer to the same question."""
    texts: defaultdict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for asked in outcomes:
        if not asked.error:
            texts[asked.client, asked.question][asked.text] += 1
    right = {what: counted.most_common(1)[0][0] for what, counted in texts.items()}
    return sum(
        not right.get((asked.client, asked.question), asked.text).startswith(asked.text)
        or (not asked.error and asked.text != right[asked.client, asked.question])
        for asked in outcomes
    )


@dataclass(frozen=True)
class Fault:
    """`strike` gets the cluster and a host with a replica of the stage `of`; `repair` replaces the host if it is
    lost."""

    name: str
    of: str
    strike: Callable[[HostCluster, Host], None]
    repair: Callable[[HostCluster, Host], None] = lambda _cluster, _host: None


def _kill_replica(cluster: HostCluster, host: Host) -> None:
    _kill(host, "ray::ServeReplica:llava:Generator")
    until(lambda: not cluster.is_complete(), "Serve has detected that a replica is dead", deadline_s=_MOST_S)


def _kill_raylet(cluster: HostCluster, host: Host) -> None:
    _kill(host, "/raylet/raylet ")


def _kill_host(cluster: HostCluster, host: Host) -> None:
    host.kill()


def _cut_power(cluster: HostCluster, host: Host) -> None:
    cluster.network.unplug(host)
    host.kill()


def _kill_controller(cluster: HostCluster, host: Host) -> None:
    _kill(cluster.head, "ray::ServeController")


def _kill_entrance(cluster: HostCluster, host: Host) -> None:
    _kill(host, "/haproxy -db")


def _kill_entrances_manager(cluster: HostCluster, host: Host) -> None:
    _kill(host, "ray::HAProxyManager")


def _cut(seconds: float) -> Callable[[HostCluster, Host], None]:
    """Cut the links between the host and all other workers, but not to the head and the clients."""

    def strike(cluster: HostCluster, host: Host) -> None:
        others = [other for other in cluster.workers if other is not host]
        for other in others:
            cluster.network.cut(host, other)
        time.sleep(seconds)
        for other in others:
            cluster.network.mend(host, other)

    return strike


def _unplug(seconds: float) -> Callable[[HostCluster, Host], None]:
    """Cut the host off from everything."""

    def strike(cluster: HostCluster, host: Host) -> None:
        cluster.network.unplug(host)
        time.sleep(seconds)
        cluster.network.plug(host)

    return strike


def _kill(host: Host, name: str) -> None:
    if not host.kill_processes(name):
        raise HostsError(f"{host.name} has no {name}")


def _replace(cluster: HostCluster, host: Host) -> None:
    cluster.replace_worker(host)
    cluster.wait_for_workers()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("generator replica killed", "Generator", _kill_replica),
        Fault("raylet killed", "Generator", _kill_raylet, _replace),
        Fault("host of a generator killed", "Generator", _kill_host, _replace),
        Fault("host of a generator without power", "Generator", _cut_power, _replace),
        Fault("host of a gateway without power", "Gateway", _cut_power, _replace),
        Fault("Serve's controller killed", "Generator", _kill_controller),
        Fault("HAProxy killed on one host", "Gateway", _kill_entrance),
        Fault("HAProxy's actor killed on one host", "Gateway", _kill_entrances_manager),
        Fault("host cut off from other workers for 5 s", "Generator", _cut(5)),
        Fault("host cut off from other workers for 60 s", "Generator", _cut(60)),
        Fault("host of a gateway cut off from other workers for 60 s", "Gateway", _cut(60)),
        Fault("host cut off from everything for 5 s", "Generator", _unplug(5)),
        Fault("host cut off from everything for 60 s", "Generator", _unplug(60), _replace),
    )
}


def measure(cluster: HostCluster, fault: Fault, *, num_clients: int = 4) -> Seen:
    """Measure a fault. The cluster is complete before and after. Raises HostsError where it does not become complete
    again."""
    until(cluster.is_complete, "the cluster is complete before the fault")
    until(lambda: not cluster.has_cut_connections(), "nothing is left of an earlier cut")
    host = cluster.host_of(fault.of)
    num_nodes = len(cluster.workers) + (fault.repair is not _replace)
    with load(cluster, num_clients) as outcomes:
        until(lambda: len(outcomes()) >= 2 * num_clients, "clients are answered")
        struck = time.monotonic()
        with ThreadPoolExecutor(1) as striking:
            struck_out = striking.submit(fault.strike, cluster, host)
            complete_at = _watch(cluster, num_nodes, outcomes, struck_out, struck)
    seen = see(outcomes(), struck, round(complete_at - struck, 1))
    fault.repair(cluster, host)
    return seen


def _watch(
    cluster: HostCluster, num_nodes: int, outcomes: Callable[[], list[Asked]], strike: Future[None], struck: float
) -> float:
    """Return when the cluster was complete for good, once all clients are content too."""
    complete_at = struck
    while True:
        now = time.monotonic()
        if not strike.done() or cluster.num_nodes() != num_nodes or not cluster.is_complete():
            complete_at = time.monotonic()
        elif _are_content(outcomes(), struck, complete_at):
            strike.result()
            return complete_at
        if now - struck > _MOST_S:
            raise HostsError(f"not complete or not answered {_MOST_S:g} s after the fault: {cluster.serve_details()}")
        time.sleep(_POLL_S)


def _are_content(outcomes: Sequence[Asked], struck: float, since: float) -> bool:
    """Whether each client has an error-free answer to a request begun after both `since` and the last complaint."""
    since = max([since, *complaints(outcomes, struck)])
    clients = {asked.client for asked in outcomes}
    return clients == {asked.client for asked in outcomes if not asked.error and asked.began > since}


@contextlib.contextmanager
def load(cluster: HostCluster, num_clients: int) -> Iterator[Callable[[], list[Asked]]]:
    """Let clients ask all workers while the block runs. Yields a function that reads the outcomes so far."""
    client, file = cluster.client, f"load-{time.monotonic_ns()}.jsonl"
    (client.own / file).touch()
    addresses = [f"{worker.address}:{PORT}" for worker in cluster.workers]
    program = (sys.executable, "-m", "benchmarks.hosts.load", "--out", f"/tmp/{file}", "--clients", str(num_clients))
    process = client.start([*program, *addresses], {"PYTHONPATH": str(ROOT)}, log="load.log")
    try:
        yield lambda: read_outcomes(client.own / file)
    finally:
        for pid in client.processes(file):
            os.kill(pid, signal.SIGTERM)
        if process.wait(60) != 0:
            raise HostsError(f"the load failed: {(client.own / 'load.log').read_text()}")
