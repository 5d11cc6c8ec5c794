"""The Ray cluster that a job runs on: the one that RAY_ADDRESS names, also under `ray job submit`, or the job's own.

The job's own cluster ends with the job, however the job ends. This module also reports the resources of the nodes and
maps paths to those that the workers see.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.batch.capacity import Resources
from cluster.batch.errors import JobError, OutputError

# For the job's own Ray, unless the user has set them: listen on loopback only (despite the name), require a token, keep
# the normal process priority, and report no usage statistics.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OBJECT_STORE_BYTES = 1024**3
# Ray itself tries for minutes, and cannot be interrupted meanwhile.
_REACHED_S = 10.0
# Ray unpacks a job's working directory here, and deletes it after the job.
_JOB_FOLDER = "/runtime_resources/working_dir_files/"


def set_environment() -> None:
    """Set ENVIRONMENT for a Ray of our own. Call it before anything imports Ray, which reads the environment once."""
    if not os.environ.get("RAY_ADDRESS"):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Stay connected to Ray inside the block, with the caller's SIGTERM handler in place of Ray's. Raises JobError
    where nobody answers at RAY_ADDRESS, or the job's own Ray does not start."""
    address = os.environ.get("RAY_ADDRESS")
    import ray

    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address, **({} if address else own))
        signal.signal(signal.SIGTERM, before)
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None, **own: Any) -> None:
    import ray

    if address is not None:
        _check_reachable(address)
    try:
        ray.init(address=address or "local", log_to_driver=False, **own)
    # Ray raises errors of many kinds, plain exceptions among them.
    except Exception as error:
        if address is None:
            raise JobError(f"Ray does not start: {error}") from error
        raise JobError(f"no Ray answers at RAY_ADDRESS={address}: {error}{_token_hint()}") from error
    except SystemExit as error:
        # Raised by Ray's SIGTERM handler.
        raise KeyboardInterrupt from error


def _check_reachable(address: str) -> None:
    """Raise JobError if nothing listens at `address`, unless it is a name such as `auto`, or a URL."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "://" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHED_S).close()
    except (OSError, OverflowError) as error:
        raise JobError(f"no Ray answers at RAY_ADDRESS={address}: {error}") from error


def _token_hint() -> str:
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return ""
    return ". If that cluster requires a token, set RAY_AUTH_MODE=token, with the token in ~/.ray/auth_token"


def node_resources() -> Sequence[Resources]:
    """Return the total resources of each live node."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def total_and_free() -> tuple[Resources, Resources]:
    """Return the total and the free resources of the whole cluster at this moment."""
    import ray

    total: Resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: Resources = ray.available_resources()  # type: ignore[no-untyped-call]
    return total, free


def autoscaler_limit() -> Resources | None:
    """Return the resources the cluster may grow to; None where it does not autoscale or gives no limit."""
    from ray._private.state import state

    limit: Resources | None = state.get_max_resources_from_cluster_config()
    return limit


def check_output_stays(path: Path) -> None:
    """Raise OutputError for a path in Ray's copy of the job's working directory, which Ray deletes after the job."""
    if _JOB_FOLDER in str(path.absolute()):
        raise OutputError(
            f"OUTPUT {path} is in Ray's copy of the job's working directory, and would be deleted with it: "
            "give an absolute path to a place that stays"
        )


def seen_by_workers(path: Path) -> Path:
    """Return the path under which workers find the file: a submitted job's workers have a working directory like this
    one's, all others may have been started anywhere."""
    return path if _JOB_FOLDER in str(path.absolute()) else path.absolute()
