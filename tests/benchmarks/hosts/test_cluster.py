"""The application on a cluster of hosts, queried from another host, under faults: `make test-cluster` tests all.

Without LLAVA_TEST_CLUSTER, as in CI, only one replica is killed.
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
# No request may fail after these: no client was connected through the killed process.
HARMLESS = ("generator replica killed", "Serve's controller killed", "host cut off from other workers for 5 s")
# Clients that were connected through the host itself are cut off and have to retry.
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


def test_replicas_are_on_different_hosts_and_every_host_answers(cluster: HostCluster) -> None:
    for stage in ("Gateway", "Preprocessor", "VisionEncoder", "Generator"):
        hosts = [address for address, _ in cluster.replicas(stage)]
        assert len(hosts) == len(set(hosts)) == 2
    for worker in cluster.workers:
        models = cluster.client.run(["curl", "-sSf", f"http://{worker.address}:{PORT}/v1/models"])
        assert json.loads(models)["data"]


def test_rays_api_requires_the_token(cluster: HostCluster) -> None:
    status = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}"]
    assert cluster.client.run([*status, f"http://{cluster.head.address}:8265/api/serve/applications/"]) == "401"


@pytest.mark.parametrize("name", HARMLESS if IS_WHOLE else HARMLESS[:1])
def test_harmless_faults_fail_no_request(cluster: HostCluster, name: str) -> None:
    seen = measure(cluster, FAULTS[name])
    assert seen.failed == {}
    assert seen.wrong == 0


@pytest.mark.parametrize("name", WITH_CONNECTIONS if IS_WHOLE else ())
def test_only_clients_connected_through_the_host_have_to_retry(cluster: HostCluster, name: str) -> None:
    seen = measure(cluster, FAULTS[name])
    assert seen.failed.keys() <= LOST_CONNECTION
    # At most once per client.
    assert sum(seen.failed.values()) <= 4
    assert seen.wrong == 0
