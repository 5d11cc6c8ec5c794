"""A Ray cluster of several hosts that runs the application, and a client host.

The head offers no CPUs, and the client host is not part of the cluster. Nodes are started and the application is
deployed with Ray's own commands, as an operator would. Knows the names of Ray's processes, but not the requests.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.hosts.network import Host, HostNetwork, HostsError
from deployments.launch.config_file import IMPORT_PATH
from deployments.launch.environment import CLUSTER_ENVIRONMENT

ROOT = Path(__file__).parents[2]
RAY = (sys.executable, "-m", "ray.scripts.scripts")
SERVE = (sys.executable, "-m", "ray.serve.scripts")
PORT, _GCS_PORT, _DASHBOARD_PORT, _REDIS_PORT = 8000, 6379, 8265, 6379
_OBJECT_STORE_BYTES = 128 * 1024**2
_STAGES = ("Gateway", "Preprocessor", "VisionEncoder", "Generator")
# Long enough for busy machines.
START_S = 300.0
_POLL_S = 0.25


class HostCluster:
    """A head, `num_workers` workers and a client; all but the client have Ray's token. With `has_redis`, the head keeps
    its state in Redis, on a separate host."""

    def __init__(self, network: HostNetwork, *, num_workers: int = 3, has_redis: bool = False) -> None:
        self.network = network
        self.environment = {
            **CLUSTER_ENVIRONMENT,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT),
            # All hosts share the machine's memory with other programs.
            "RAY_memory_monitor_refresh_ms": "0",
            "HF_HUB_OFFLINE": "1",
        }
        # The `ray start` process of each host.
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.head = network.start_host("head")
        self.client = network.start_host("client")
        self.workers = [network.start_host(f"worker{number}") for number in range(1, num_workers + 1)]
        self.redis = network.start_host("redis") if has_redis else None

    def start(self) -> None:
        """Start the cluster. Returns when all nodes have joined. Raises HostsError."""
        if self.redis is not None:
            options = ["--port", str(_REDIS_PORT), "--bind", self.redis.address, "--protected-mode", "no", "--save", ""]
            self.redis.start(["redis-server", *options], {}, log="redis.log")
        self.start_head()
        for worker in self.workers:
            self.start_worker(worker)
        self.wait_for_workers()

    def wait_for_workers(self) -> int:
        """Wait until all have joined. Replaces workers whose Ray ends meanwhile, as an operator would, and returns how
        many."""
        num_ended = 0

        def have_joined() -> bool:
            nonlocal num_ended
            for worker in [each for each in self.workers if self.has_ended(each)]:
                self.replace_worker(worker)
                num_ended += 1
            return self.num_nodes() == len(self.workers) + 1

        until(have_joined, "all workers have joined")
        return num_ended

    def start_head(self) -> None:
        """Start Ray on the head. Returns when it accepts nodes."""
        options = ["--head", f"--port={_GCS_PORT}", "--num-cpus=0", "--dashboard-host=0.0.0.0"]
        kept = {} if self.redis is None else {"RAY_REDIS_ADDRESS": f"{self.redis.address}:{_REDIS_PORT}"}
        self._start_node(self.head, *options, **kept)
        until(lambda: self.num_nodes() > 0, "the head runs")

    def start_worker(self, worker: Host, *, num_cpus: int = 1) -> None:
        """Start Ray on a worker. Returns at once."""
        self._start_node(worker, f"--address={self.head.address}:{_GCS_PORT}", f"--num-cpus={num_cpus}")

    def _start_node(self, host: Host, *options: str, **environment: str) -> None:
        sizes = [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats", "--include-log-monitor=false"]
        command = [*RAY, "start", "--block", *options, *sizes]
        self._nodes[host.name] = host.start(command, {**self.environment, **environment}, log="ray-start.log")

    def has_ended(self, host: Host) -> bool:
        """Whether Ray no longer runs on the host: then its `ray start` ends by itself."""
        return self._nodes[host.name].poll() is not None

    def replace_worker(self, worker: Host) -> Host:
        """Replace a worker by a new host with its name and address; returns before that has joined."""
        worker.kill()
        new = self.network.start_host(worker.name, worker.address)
        self.workers[self.workers.index(worker)] = new
        self.start_worker(new)
        return new

    def replace_head(self) -> None:
        """Replace the head by a new host with its name and address; returns when that accepts nodes."""
        self.head.kill()
        self.head = self.network.start_host(self.head.name, self.head.address)
        self.start_head()

    def host_of(self, stage: str) -> Host:
        """Return a host with a replica of this stage, if possible without one of the gateway."""
        addresses = {address for address, _ in self.replicas(stage)}
        gateways = {address for address, _ in self.replicas("Gateway")} if stage != "Gateway" else set()
        candidates = [worker for worker in self.workers if worker.address in addresses]
        return min(candidates, key=lambda worker: worker.address in gateways)

    def num_nodes(self) -> int:
        """Return the number of nodes that Ray considers alive."""
        nodes = self.dashboard("/nodes?view=summary")
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes.get("data", {}).get("summary", []))

    def has_cut_connections(self) -> bool:
        """Whether any host has cut connections, see Host."""
        return any(host.has_cut_connections() for host in (self.head, self.client, *self.workers))

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Run `serve deploy` on the head. Returns when all replicas serve. Raises HostsError."""
        # JSON is YAML, too.
        (self.head.own / "serve_config.yaml").write_text(json.dumps(config))
        command = [*SERVE, "deploy", "/tmp/serve_config.yaml", "-a", f"http://{self.head.address}:{_DASHBOARD_PORT}"]
        self.head.run(command, self.environment)
        until(self.is_complete, "all replicas serve")

    def is_complete(self) -> bool:
        """Whether each deployment has its target number of replicas, all of them running on live nodes."""
        applications = self.serve_details().get("applications", {})
        states = [application["status"] for application in applications.values()]
        if "DEPLOY_FAILED" in states:
            raise HostsError(f"the application cannot be deployed: {applications}")
        deployments = self._deployments().values()
        return bool(deployments) and all(
            each["status"] == "HEALTHY" and len(each["replicas"]) == each["target_num_replicas"] for each in deployments
        )

    def serve_details(self) -> dict[str, Any]:
        """Return the state that Serve's controller reports through the head's dashboard; empty without an answer."""
        return self.dashboard("/api/serve/applications/")

    def replicas(self, stage: str) -> list[tuple[str, str]]:
        """Return the host's address and the state of each replica of a stage."""
        found = self._deployments().get(stage, {}).get("replicas", [])
        return sorted((replica.get("node_ip") or "", replica["state"]) for replica in found)

    def _deployments(self) -> dict[str, Any]:
        applications = self.serve_details().get("applications", {}).values()
        return {name: each for application in applications for name, each in application["deployments"].items()}

    def dashboard(self, path: str) -> dict[str, Any]:
        """Query the head's dashboard, from the head; empty if it does not answer."""
        authorization = f"authorization: Bearer {self.environment['RAY_AUTH_TOKEN']}"
        url = f"http://{self.head.address}:{_DASHBOARD_PORT}{path}"
        try:
            answer = self.head.run(["curl", "-sSf", "-m", "10", "-H", authorization, url], timeout_s=30)
            return dict(json.loads(answer))
        except (HostsError, json.JSONDecodeError):
            return {}


def application(*, stages: Mapping[str, Mapping[str, Any]], **args: Any) -> dict[str, Any]:
    """Return Serve's configuration of the service with these `args`, and these Serve options for its stages."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": PORT},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": "llava",
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {"auth": {"allow_anyone": True}, **args},
                "deployments": [{"name": name, **options} for name, options in stages.items()],
            }
        ],
    }


def spread(num_replicas: int = 2) -> dict[str, dict[str, Any]]:
    """Return options for so many replicas of each stage, no two of them on the same host."""
    return {name: {"num_replicas": num_replicas, "max_replicas_per_node": 1} for name in _STAGES}


def until(condition: Callable[[], bool], what: str, *, deadline_s: float = START_S) -> float:
    """Wait for a condition and return the seconds it took. Raises HostsError after `deadline_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > deadline_s:
            raise HostsError(f"not within {deadline_s:g} s: {what}")
        time.sleep(_POLL_S)
    return time.monotonic() - began
