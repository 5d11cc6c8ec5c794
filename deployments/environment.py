"""The environment of a local Ray, which Ray and Serve read at import. Constants alone; the launcher sets it."""

from __future__ import annotations

from collections.abc import Mapping

# Of one machine alone.
_LOCAL = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "no_grpc_proxy")

# Set unless the user has set them; `docs/decisions` has the measurements.
ENVIRONMENT: Mapping[str, str] = {
    # One event loop per replica, gRPC between replicas: about twice the tokens per second.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # It would also keep a thousand log records back, and lose those of a replica that dies.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # Gateways listen themselves, behind HAProxy (load_balancer.py): half the processor time for each piece of text. It
    # finds out by itself when one has ended, so nobody has to be told 30 s before.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    # On a busy machine 5 s are not enough for the HTTP proxy, and Serve would kill it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    # Despite its name: every port of a local Ray on the loopback interface alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would run replicas at niceness 15, behind everything else on the machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # What nobody looks at costs a tenth of the processor time of small requests: a record of every call for Ray's
    # dashboard, Serve's counters ten times a second, and its controller's rounds as often.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Serve's gRPC ports between replicas are open to the network: only who has Ray's token may call.
    "RAY_AUTH_MODE": "token",
    # gRPC would ask an `http_proxy` for a replica on this machine.
    "no_grpc_proxy": "127.0.0.1,localhost",
}

# Of every node of a cluster, before `ray start`; `docs/cluster-faults.md` has the measurements. Ray listens on the
# addresses of the nodes there.
CLUSTER_ENVIRONMENT: Mapping[str, str] = {
    **{name: value for name, value in ENVIRONMENT.items() if name not in _LOCAL},
    # Serve starts one on every node, in place of the entrance that `llava serve` has.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A host that has lost power is dead after (1 + 2) * 4 s, and not after a minute. Raylets are asked, which are never
    # too busy to answer.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
