"""The environment of a local Ray: what Ray and Serve read when they are imported, for the service on one machine.

Constants alone; the launcher sets them.
"""

from __future__ import annotations

from collections.abc import Mapping

# Set unless the user has set them; `docs/decisions` has the measurements.
ENVIRONMENT: Mapping[str, str] = {
    # One event loop per replica, gRPC between replicas, buffered logs: about twice the tokens per second.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # It would also open a port per gateway replica, and hold each shutdown up for 30 s.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # On a busy machine 5 s are not enough for the HTTP proxy, and Serve would kill it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    # Despite its name: every port of a local Ray on the loopback interface alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would run replicas at niceness 15, behind everything else on the machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Serve's gRPC ports between replicas are open to the network: only who has Ray's token may call.
    "RAY_AUTH_MODE": "token",
    # gRPC would ask an `http_proxy` for a replica on this machine.
    "no_grpc_proxy": "127.0.0.1,localhost",
}
