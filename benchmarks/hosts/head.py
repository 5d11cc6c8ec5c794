"""Loss of the head under load: whether the service keeps serving without it, and what complete recovery takes.

Another head starts at the same address after a while, as under Kubernetes, and workers whose Ray has ended are
restarted. Without Redis, Ray has forgotten everything and the application is redeployed; with it nothing needs doing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.hosts.cluster import HostCluster, until
from benchmarks.hosts.faults import Seen, load, see

# Time until another head starts.
DOWN_S = 20.0


@dataclass(frozen=True)
class HeadLoss:
    """What clients saw overall, how many answers they got while there was no head, how many workers had to be
    restarted, and the seconds from the loss until the service was complete."""

    seen: Seen
    answered_without_head: int
    workers_lost: int
    complete_s: float


def measure_head_loss(cluster: HostCluster, config: Mapping[str, Any], *, num_clients: int = 4) -> HeadLoss:
    """Measure one loss of the head. The cluster is complete before and after."""
    until(cluster.is_complete, "the cluster is complete before the fault")
    with load(cluster, num_clients) as outcomes:
        until(lambda: len(outcomes()) >= 2 * num_clients, "clients are answered")
        struck = time.monotonic()
        cluster.network.unplug(cluster.head)
        cluster.head.kill()
        time.sleep(DOWN_S)
        restarted = time.monotonic()
        cluster.replace_head()
        lost = cluster.wait_for_workers()
        if cluster.redis is None:
            cluster.deploy(config)
        else:
            until(cluster.is_complete, "all replicas serve")
        complete_s = time.monotonic() - struck
        # Wait until each client has an answer that it has asked for since.
        since = time.monotonic()
        until(
            lambda: len({each.client for each in outcomes() if not each.error and each.began > since}) == num_clients,
            "all clients are answered",
        )
    answered = [each for each in outcomes() if not each.error and struck + 1 < each.began and each.ended < restarted]
    return HeadLoss(see(outcomes(), struck), len(answered), lost, round(complete_s, 1))
