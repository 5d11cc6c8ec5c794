"""The environment of a local Ray and of a cluster's nodes, which Ray and Serve read at import. Only constants: the
launcher sets the former, cluster/kubernetes/base/ray.env is the latter."""

from __future__ import annotations

from collections.abc import Mapping

# Only for a single machine.
_LOCAL = (
    # On a cluster, a gateway keeps taking requests until the HAProxy on every other node knows that it is draining.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    # Listening only on the loopback interface would keep nodes apart.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    # No `http_proxy` is set on a cluster, and its nodes may have any address.
    "no_grpc_proxy",
)

# Set unless the user has set them; `docs/decisions` has the measurements.
ENVIRONMENT: Mapping[str, str] = {
    # One event loop per replica, gRPC between replicas: about twice the tokens per second.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # That mode would also buffer a thousand log records, and lose those of a replica that dies.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # Gateways listen themselves, behind HAProxy (load_balancer.py): half the processor time for each piece of text.
    # HAProxy detects by itself when a gateway has ended, so Serve need not keep it draining for 30 s.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    # On a busy machine 5 s are too short for the HTTP proxy to become ready, and Serve would kill it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    # Despite its name: restricts every port of a local Ray to the loopback interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would run replicas at niceness 15, behind everything else on the machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A tenth of the processor time of small requests would go into data that nobody reads: a record of every call for
    # Ray's dashboard, Serve's counters ten times a second, and its controller's rounds equally often.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Serve's gRPC ports between replicas are open to the network: only callers with Ray's token are accepted.
    "RAY_AUTH_MODE": "token",
    # gRPC would ask an `http_proxy` for a replica on this machine.
    "no_grpc_proxy": "127.0.0.1,localhost",
}

# For every node of a cluster, before `ray start`; `docs/cluster-faults.md` has the measurements.
CLUSTER_ENVIRONMENT: Mapping[str, str] = {
    **{name: value for name, value in ENVIRONMENT.items() if name not in _LOCAL},
    # Serve starts an HAProxy on every node, in place of the one that `llava serve` starts, and with the same limits
    # (load_balancer.py).
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_RETRIES": "20",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "90",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "3600",
    # Whenever a replica is added or removed, a new HAProxy takes over, and the old one cuts all its streams, whatever
    # replica they come from, after so many seconds: more than the longest answer takes.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "960",
    # A host that has lost power counts as dead after (1 + 2) * 4 s rather than a minute. The checks ask raylets, which
    # are never too busy to answer.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
