"""The Ray that a job runs on: the one that RAY_ADDRESS names, also within `ray job submit`, or one of the job's own.

Its own ends with the job, however that ends. Says what its nodes have, and which paths its machines see.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.batch.capacity import Resources
from cluster.batch.errors import JobError, OutputError

# Of a Ray of one's own, set unless the user has set it: on the loopback interface alone (despite the name), for who has
# its token, at the priority of other programs, and without telling anybody.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_OBJECT_STORE_BYTES = 1024**3
# Where Ray unpacks the working directory of a job, and what it deletes when it has ended.
_JOB_FOLDER = "/runtime_resources/working_dir_files/"


def set_environment() -> None:
    """To be called before anything imports Ray, which looks once."""
    if not os.environ.get("RAY_ADDRESS"):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connected within. SIGTERM does what it did before, and not what Ray makes of it. Raises JobError where nobody
    answers at RAY_ADDRESS."""
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

    try:
        ray.init(address=address or "local", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(f"no Ray answers at RAY_ADDRESS={address}: {error}" if address else str(error)) from error
    except SystemExit as error:
        # Of its handler of SIGTERM.
        raise KeyboardInterrupt from error


def node_resources() -> Sequence[Resources]:
    """What each living node has in all."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def total_and_free() -> tuple[Resources, Resources]:
    """Of the whole cluster, at this moment."""
    import ray

    total: Resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: Resources = ray.available_resources()  # type: ignore[no-untyped-call]
    return total, free


def autoscaler_limit() -> Resources | None:
    """What the cluster may grow to. None where it does not grow, or does not say so."""
    from ray._private.state import state

    limit: Resources | None = state.get_max_resources_from_cluster_config()
    return limit


def check_output_stays(path: Path) -> None:
    """Raise OutputError for one in the copy of the working directory that Ray makes for a job, and deletes after it."""
    if _JOB_FOLDER in str(path.absolute()):
        raise OutputError(
            f"OUTPUT {path} is in the copy that Ray has made of the job's working directory, and would be deleted with "
            "it: give an absolute path, to a place that stays"
        )


def seen_by_workers(path: Path) -> Path:
    """The path as other processes find the file: those of a job have a working directory like this one's, all others
    may have been started anywhere."""
    return path if _JOB_FOLDER in str(path.absolute()) else path.absolute()
