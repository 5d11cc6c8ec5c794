"""A Ray cluster on this machine whose autoscaler adds and removes nodes: real raylets, each claiming resources.

It is set up like `ray.cluster_utils.AutoscalingCluster`, which cannot be used itself: when it starts, it ends every Ray
on the machine and reads a file that Ray's wheels lack. Knows nothing of what runs on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ports import free_port
from deployments.launch.environment import ENVIRONMENT
from deployments.launch.processes import descendants, end

_HEAD, _WORKER = "ray.head.default", "worker"
# The provider's class by its import path: for its short name, Ray looks for a missing file of defaults.
_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
# The id by which the provider knows the head node, which runs the autoscaler.
_HEAD_ID = "f" * 51 + "00000"
_OF_HEAD = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
}
_COMMANDS = [
    f"{when}_commands"
    for when in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
]
_STARTUP_S, _PATIENCE_S, _POLL_S = 120.0, 10.0, 0.1
_OBJECT_STORE_BYTES = 128 * 1024**2


@dataclass(frozen=True)
class Cluster:
    """`address` is for ray.init; `folder` holds the files of all its processes."""

    address: str
    folder: Path

    @property
    def logs(self) -> Path:
        """The folder of Serve's logs."""
        return next(self.folder.glob("ray/session_[0-9]*")) / "logs" / "serve"


@contextlib.contextmanager
def autoscaling_cluster(
    head: Mapping[str, float], worker: Mapping[str, float], *, max_workers: int, idle_s: float
) -> Iterator[Cluster]:
    """Start with the head node alone. Workers are removed after `idle_s` idle seconds. The cluster ends with the
    block."""
    # A short path: it contains sockets, whose paths are limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="as", dir="/tmp"))
    address = f"127.0.0.1:{free_port()}"
    os.environ.update(_environment(folder))
    settings = folder / "autoscaling.json"
    settings.write_text(json.dumps(_settings(address, head, worker, max_workers, idle_s)))
    with (folder / "head.log").open("wb") as log:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
        command += [f"--num-cpus={head['CPU']:g}", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        command += [f"--autoscaling-config={settings}"]
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **_OF_HEAD})
    try:
        _wait(process, folder)
        yield Cluster(address, folder)
    finally:
        own = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        end(own, patience_s=_PATIENCE_S)
        process.wait(timeout=_PATIENCE_S)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of every process including this one; nodes inherit it."""
    return {
        **ENVIRONMENT,
        # Serve's own proxy on the head node, as on any cluster.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        # A free port for the autoscaler's metrics, because another Ray on this machine may use the default.
        "AUTOSCALER_METRIC_PORT": str(free_port()),
    }


def _settings(
    address: str, head: Mapping[str, float], worker: Mapping[str, float], max_workers: int, idle_s: float
) -> dict[str, Any]:
    resources = {**worker, "object_store_memory": _OBJECT_STORE_BYTES}
    return {
        "cluster_name": "scaling",
        "max_workers": max_workers,
        "provider": {
            "type": "external",
            "module": _PROVIDER,
            "gcs_address": address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            # Nodes are processes on this machine, and Ray detects by itself when one has died.
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "worker_liveness_check": False,
        },
        "available_node_types": {
            _HEAD: {"resources": dict(head), "node_config": {}, "max_workers": 0},
            _WORKER: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": max_workers},
        },
        "head_node_type": _HEAD,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 10,
        # Required fields for installing Ray on a machine, unused here.
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{name: [] for name in _COMMANDS},
    }


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + _STARTUP_S
    log = folder / "head.log"
    while "--block" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the cluster did not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(_POLL_S)
