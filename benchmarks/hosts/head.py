"""The head is lost under load: whether the service goes on without it, and what it takes to be whole again.

Another head starts at the same address after a while, as Kubernetes starts one, and workers whose Ray has ended start
anew. Without Redis Ray has forgotten everything, and the application is deployed again; with it nobody does anything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.hosts.cluster import HostCluster, until
from benchmarks.hosts.faults import Seen, load, see

# Until another head starts.
DOWN_S = 20.0


@dataclass(frozen=True)
class HeadLoss:
    """What clients saw in all, how many answers they got while there was no head, how many workers had to start anew,
    and seconds from the loss until the service was complete."""

    seen: Seen
    answered_without_head: int
    workers_lost: int
    complete_s: float


def measure_head_loss(cluster: HostCluster, config: Mapping[str, Any], *, num_clients: int = 4) -> HeadLoss:
    """The cluster is complete before and after."""
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
        # An answer of each client that was asked for since then.
        since = time.monotonic()
        until(
            lambda: len({each.client for each in outcomes() if not each.error and each.began > since}) == num_clients,
            "all clients are answered",
        )
    answered = [each for each in outcomes() if not each.error and struck + 1 < each.began and each.ended < restarted]
    return HeadLoss(see(outcomes(), struck), len(answered), lost, round(complete_s, 1))
