"""Starts the service on this machine: starts its own Ray, deploys a launch plan's application, waits until it is ready.

Progress goes to a callback; prints nothing. Importing this file does not import Ray, because Ray reads its environment
when it is imported.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.access.exposure import ENTRANCE_VARIABLE
from deployments.errors import LaunchError
from deployments.launch.config_file import find_application
from deployments.launch.deploying import StatusQuestion, deploy, serve_schema, watch
from deployments.launch.environment import ENVIRONMENT
from deployments.launch.load_balancer import LoadBalancer, balance_gateways, balance_proxy
from deployments.launch.losses import Losses
from deployments.launch.plan import LaunchPlan
from deployments.launch.processes import Process, descendants, end, name_of
from deployments.placement import check_placement, nodes_of
from deployments.ports import choose_metrics_port
from deployments.preflight import share_towers
from deployments.settings.app import AppArgs
from llava_core.client import Client

_VITAL = ("gcs_server", "raylet")
# For objects in transit between stages; cached features come on top.
_IN_FLIGHT_BYTES = 512 * 1024**2
_POLL_S, _HTTP_DEADLINE_S, _STOP_PATIENCE_S = 0.1, 60.0, 5.0
# An HAProxy that ends sooner than this has not ended by chance.
_BALANCED_S = 5.0


@dataclass
class LocalService:
    """A running service and the Ray under it. `stop` ends every process that `start` has begun, however far it got, and
    leaves the caller's other processes alone.

    Once Ray has started, `logs` is the folder of Serve's logs and `metrics_url` the Prometheus page of all processes.
    `balancer` is in front of the gateways or of Serve's proxy.
    """

    plan: LaunchPlan
    logs: Path | None = None
    metrics_url: str | None = None
    balancer: LoadBalancer | None = None
    _started: float = field(default_factory=time.monotonic)
    _before: set[Process] | None = None
    _own: set[Process] = field(default_factory=set)
    _vital: set[Process] = field(default_factory=set)
    # When HAProxy was last started.
    _balanced_at: float = field(default_factory=time.monotonic)
    _question: StatusQuestion | None = None
    _losses: Losses = field(default_factory=Losses)

    def start(self, report: Callable[[str], None]) -> None:
        """Returns when the service answers; `report` is given a line for each part that is ready by then. Raises
        LaunchError when Ray or a stage cannot start."""
        self._before = descendants(os.getpid())
        proxy = {} if self.plan.is_alone else {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
        for variable, value in {**ENVIRONMENT, **proxy}.items():
            os.environ.setdefault(variable, value)
        import ray
        from ray import serve

        self.balancer = _load_balancer(self.plan)
        os.environ[ENTRANCE_VARIABLE] = self.plan.host
        schema = serve_schema(self.plan.config, self.balancer.host, self.balancer.proxy_port)
        context = self._start_ray(report)
        self._own = descendants(os.getpid()) - self._before
        self._vital = {process for process in self._own if name_of(process) in _VITAL}
        # Not `session_latest`, which belongs to the Ray that was last started on this machine.
        self.logs = Path(context.address_info["session_dir"]) / "logs" / "serve"
        # On the loopback interface only, as all of Ray's ports (ENVIRONMENT).
        self.metrics_url = f"http://127.0.0.1:{context.address_info['metrics_export_port']}/metrics"
        report(self._ready("Ray"))
        if "deployments" not in find_application(self.plan.config):
            nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
            check_placement(self.plan.args, lambda: share_towers(self.plan.args, self.plan.found), nodes)
        serve.start(
            proxy_location="HeadOnly",
            http_options=schema.http_options.model_dump(),
            # Also for the controller and the proxy, for which `deploy_apps` comes too late.
            logging_config=schema.logging_config,
            tracing_config=schema.tracing_config,
        )
        deploy(schema)
        for stage in watch(self.plan.application):
            report(self._ready(stage))
        self.balancer.start()
        self._balanced_at = time.monotonic()
        self._wait_for_http()
        self._question = StatusQuestion(self.plan.application)
        report(self._ready("HTTP"))

    def update(self, plan: LaunchPlan) -> None:
        """Replaces replicas by new ones; the old ones finish their requests before they stop. Returns when all new
        replicas serve and the old ones have stopped. Raises LaunchError when new ones cannot start; nothing is served
        then until another update."""
        assert self.balancer is not None, "it has been started"
        schema = serve_schema(plan.config, self.balancer.host, self.balancer.proxy_port)
        self.plan, self._question = plan, None
        deploy(schema)
        for _ in watch(plan.application):
            pass
        self._wait_for_http()
        self._question, self._losses = StatusQuestion(plan.application), Losses()

    def check(self) -> None:
        """Raise LaunchError when a vital process has ended. HAProxy is restarted, unless it has only just been
        started."""
        if self._vital - descendants(os.getpid()):
            raise LaunchError(f"Ray has ended; its logs are in {self.logs}")
        if self.balancer is None or self.balancer.is_running:
            return
        if time.monotonic() < self._balanced_at + _BALANCED_S:
            raise LaunchError("HAProxy has ended, so the service cannot be reached")
        self.balancer.stop()
        self.balancer.start()
        self._balanced_at = time.monotonic()

    def news(self) -> list[str]:
        """Returns a sentence for each stage that has lost a replica or is complete again since the last call. Waits for
        nothing. There is no news while nothing is served because an update has failed."""
        return [] if self._question is None else self._losses.news(self._question.poll())

    def stop(self) -> None:
        """Cuts off running requests. Returns when the last process has ended."""
        if self._before is None:
            return
        import ray

        own = self._own or descendants(os.getpid()) - self._before
        own |= descendants(*(process.pid for process in own))
        if self.balancer is not None:
            self.balancer.stop()
        ray.shutdown()
        end(own, patience_s=_STOP_PATIENCE_S)

    def _start_ray(self, report: Callable[[str], None]) -> Any:
        assert self._before is not None, "only what this service has started is ended again"
        metrics_port = self.plan.metrics_port
        try:
            return self._init_ray(metrics_port)
        except LaunchError as error:
            # Wrong settings stay wrong.
            if isinstance(error.__cause__, ValueError):
                raise
            # Ray gives its processes 30 s, whatever the machine. A cold disk may need more, but only once.
            report(f"{error}. Trying once more ...")
        import ray

        ray.shutdown()
        end(descendants(os.getpid()) - self._before, patience_s=0.0)
        # Or another program has taken the port meanwhile, which ends Ray's processes and makes it wait all the same.
        asked = None if metrics_port == self.plan.port + 1 else metrics_port
        return self._init_ray(choose_metrics_port(self.plan.port, asked))

    def _init_ray(self, metrics_port: int) -> Any:
        import ray

        before = _last_session()
        try:
            return ray.init(
                address="local",
                namespace="serve",
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=_IN_FLIGHT_BYTES + _kept_bytes(self.plan.args),
                # Ray's agent serves the metrics, with or without a dashboard.
                _metrics_export_port=metrics_port or None,
            )
        # Ray raises errors of many kinds, plain exceptions among them.
        except Exception as error:
            session = _last_session()
            logs = "" if session in (None, before) else f"; its logs are in {session}/logs"
            raise LaunchError(f"Ray has not started ({error}){logs}") from error

    def _ready(self, what: str) -> str:
        return f"{what:24} ready after {time.monotonic() - self._started:5.1f} s"

    def _wait_for_http(self) -> None:
        deadline = time.monotonic() + _HTTP_DEADLINE_S
        with Client(self.plan.url) as client:
            while not client.is_healthy():
                if time.monotonic() > deadline:
                    raise LaunchError(f"the stages are up, but {self.plan.url}/health does not confirm it")
                time.sleep(_POLL_S)


def _last_session() -> Path | None:
    """The folder of the Ray that was last started on this machine."""
    from ray._common.utils import get_default_ray_temp_dir

    link = Path(get_default_ray_temp_dir(), "session_latest")  # type: ignore[no-untyped-call]
    return link.resolve() if link.is_symlink() else None


def _kept_bytes(args: AppArgs) -> int:
    """The most that all vision encoders may cache in the object store, if none of them is shared."""
    encoders = [model.vision_encoder for model in args.own_models]
    return sum(encoder.cache_bytes * encoder.max_replicas for encoder in encoders)


def _load_balancer(plan: LaunchPlan) -> LoadBalancer:
    address = plan.host, plan.port
    if os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1":
        return balance_gateways(address, plan.application, max_gateways=plan.max_gateways)
    return balance_proxy(address, plan.application)
