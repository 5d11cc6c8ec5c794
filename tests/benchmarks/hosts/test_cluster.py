"""The application on a cluster of hosts, asked from yet another host, while things die: `make test-cluster` has all.

Without LLAVA_TEST_CLUSTER only one replica is killed, which is the form for CI.
"""

import json
import os
from collections.abc import Iterator

import pytest

from benchmarks.hosts.__main__ import deployed
from benchmarks.hosts.cluster import PORT, HostCluster
from benchmarks.hosts.faults import FAULTS, measure
from benchmarks.hosts.network import why_not

IS_WHOLE = bool(os.environ.get("LLAVA_TEST_CLUSTER"))
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
# After these nobody may fail: what has died had no client's connection.
HARMLESS = ("generator replica killed", "Serve's controller killed", "host cut off from other workers for 5 s")
# Clients that were connected through the host itself are cut off, and have to ask again.
WITH_CONNECTIONS = (
    "HAProxy killed on one host",
    "raylet killed",
    "host of a generator killed",
    "host of a generator without power",
    "host cut off from other workers for 60 s",
)
LOST_CONNECTION = {"connection lost", "silence", "cut short", "status 500 of HAProxy"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    with deployed(num_workers=3 if IS_WHOLE else 2) as cluster:
        yield cluster


def test_replicas_are_on_different_hosts_and_every_host_answers_the_clients(cluster: HostCluster) -> None:
    for stage in ("Gateway", "Preprocessor", "VisionEncoder", "Generator"):
        hosts = [address for address, _ in cluster.replicas(stage)]
        assert len(hosts) == len(set(hosts)) == 2
    for worker in cluster.workers:
        models = cluster.client.run(["curl", "-sSf", f"http://{worker.address}:{PORT}/v1/models"])
        assert json.loads(models)["data"]


def test_rays_token_is_asked_for_by_whoever_is_on_the_network(cluster: HostCluster) -> None:
    status = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}"]
    assert cluster.client.run([*status, f"http://{cluster.head.address}:8265/api/serve/applications/"]) == "401"


@pytest.mark.parametrize("name", HARMLESS if IS_WHOLE else HARMLESS[:1])
def test_no_client_notices_more_than_a_pause(cluster: HostCluster, name: str) -> None:
    seen = measure(cluster, FAULTS[name])
    assert seen.failed == {}
    assert seen.wrong == 0


@pytest.mark.parametrize("name", WITH_CONNECTIONS if IS_WHOLE else ())
def test_only_who_was_connected_through_the_host_asks_again(cluster: HostCluster, name: str) -> None:
    seen = measure(cluster, FAULTS[name])
    assert seen.failed.keys() <= LOST_CONNECTION
    # Each client once at most.
    assert sum(seen.failed.values()) <= 4
    assert seen.wrong == 0
