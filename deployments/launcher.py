"""Starts the service on this machine: its own Ray, the application of serve_config.yaml, a watch until it is ready.

Whatever can be known to be wrong is found before Ray starts. Progress goes to a callback; prints nothing. Importing
this file does not import Ray, because Ray reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.client import is_healthy
from deployments.deploy_failures import raise_if_failed
from deployments.environment import ENVIRONMENT
from deployments.errors import LaunchError
from deployments.exposure import check_exposure
from deployments.load_balancer import LoadBalancer, load_balancer
from deployments.ports import check_port, choose_metrics_port
from deployments.preflight import check_checkpoint
from deployments.processes import Process, descendants, end, name_of
from deployments.settings import AppArgs

CONFIG_FILE = "serve_config.yaml"
IMPORT_PATH = "deployments.app:build_app"
DEFAULT_CONFIG: Mapping[str, Any] = {
    "logging_config": {"enable_access_log": False},
    "applications": [{"name": "llava", "route_prefix": "/", "import_path": IMPORT_PATH}],
}

_MANY_GATEWAYS = 64
_VITAL = ("gcs_server", "raylet")
_OBJECT_STORE_BYTES = 1024**3
_POLL_S, _HTTP_DEADLINE_S, _STOP_PATIENCE_S = 0.1, 60.0, 5.0


@dataclass(frozen=True)
class LaunchPlan:
    """What is to be started, all of it checked."""

    config: Mapping[str, Any]
    args: AppArgs
    host: str
    port: int
    route_prefix: str = "/"
    # 0: whichever is free.
    metrics_port: int = 0

    @property
    def url(self) -> str:
        """Where clients on this machine reach the service, its route prefix included."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


def plan_launch(
    config: Path | None = None,
    *,
    model: str | None = None,
    base: str | None = None,
    host: str | None = None,
    port: int | None = None,
    metrics_port: int | None = None,
    offline: bool = False,
) -> LaunchPlan:
    """Read the configuration, let the options override it, and look at settings, ports and checkpoint.

    Raises LaunchError, ExposureError, KeysFileError or CheckpointError, with one message that says what to do.
    """
    content = _read_config(config)
    application = _find_application(content)
    given = dict(application.get("args") or {})
    if model is not None:
        given["model"] = model
        # The base of another model, and their revisions.
        for other in ("base", "revisions"):
            given.pop(other, None)
    if base is not None:
        given["base"] = base
    if offline:
        given["offline"] = True
    args = _check_args(given)
    http = dict(content.get("http_options") or {})
    address = host or http.get("host", "127.0.0.1"), port or http.get("port", 8000)
    check_exposure(address[0], args.auth)
    check_port(*address)
    metrics_port = choose_metrics_port(address[1], metrics_port)
    prefix = application.get("route_prefix", "/")
    if not prefix:
        raise LaunchError("the application has no route_prefix, so that nobody could reach it")
    found = check_checkpoint(args)
    # Its replicas are on this machine, where all of it is by now.
    given |= {"auth": args.auth.model_dump()} if args.auth.keys_file else {}
    named = {"model": found.model, "base": found.base, "model_name": args.served_name}
    application["args"] = {**given, **named, "revisions": dict(found.revisions), "offline": True}
    content["http_options"] = {**http, "host": address[0], "port": address[1]}
    return LaunchPlan(content, args, *address, prefix, metrics_port)


def check_resources(args: AppArgs, available: Mapping[str, float]) -> None:
    """Raise LaunchError when the smallest number of replicas asks for more than there is: Serve would wait for ever."""
    stages = (args.gateway, args.preprocessor, args.vision_encoder, args.generator)
    wanted = {
        "CPU": sum(stage.min_replicas * stage.num_cpus for stage in stages),
        "GPU": sum(stage.min_replicas * stage.num_gpus for stage in stages),
    }
    for name, amount in wanted.items():
        if amount > available.get(name, 0) + 1e-6:
            raise LaunchError(
                f"the stages ask for {amount:g} {name}s in all, and this machine has {available.get(name, 0):g}; "
                f"lower num_{name.lower()}s or min_replicas in the configuration"
            )


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        path = Path(CONFIG_FILE)
        if not path.exists():
            return json.loads(json.dumps(DEFAULT_CONFIG))  # type: ignore[no-any-return]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise LaunchError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise LaunchError(f"{path} must hold a Serve configuration, with a list of applications")
    return content


def _find_application(content: Mapping[str, Any]) -> dict[str, Any]:
    applications = content.get("applications")
    for application in applications if isinstance(applications, list) else ():
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH:
            return application
    raise LaunchError(f"the configuration names no application whose import_path is {IMPORT_PATH}")


def _check_args(args: Any) -> AppArgs:
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in ("args", *first["loc"]))
        raise LaunchError(f"the configuration is wrong at {where}: {first['msg']}") from None


@dataclass(frozen=True)
class Progress:
    """Something became ready, `seconds` after the start."""

    what: str
    seconds: float


@dataclass
class LocalService:
    """A running service and the Ray under it. `stop` ends every process that `start` began, however far it came.

    Other processes of the caller's are none of its business. `logs` is where Serve's are, `metrics_url` Prometheus'
    page of all processes, as soon as there is a Ray; `balancer` is in front of its gateways, unless Serve's proxy is.
    """

    plan: LaunchPlan
    logs: Path | None = None
    metrics_url: str | None = None
    balancer: LoadBalancer | None = None
    _started: float = field(default_factory=time.monotonic)
    _before: set[Process] | None = None
    _own: set[Process] = field(default_factory=set)
    _vital: set[Process] = field(default_factory=set)

    def start(self, report: Callable[[Progress], None]) -> None:
        """Returns when the service answers. Raises LaunchError when a stage cannot start."""
        self._before = descendants(os.getpid())
        # Several applications share an address by their prefixes, which Serve's proxy knows and HAProxy does not.
        proxy = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"} if len(self.plan.config["applications"]) > 1 else {}
        for variable, value in {**ENVIRONMENT, **proxy}.items():
            os.environ.setdefault(variable, value)
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        schema = self._schema(ServeDeploySchema)
        if os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1":
            self.balancer = _load_balancer(self.plan)
            # Where gateways listen. Serve's proxy, which starts all the same, takes any port.
            schema.http_options = schema.http_options.model_copy(update={"host": self.balancer.host, "port": 0})
        context: Any = ray.init(
            address="local",
            namespace="serve",
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            # Ray's agent serves it, with or without a dashboard.
            _metrics_export_port=self.plan.metrics_port or None,
        )
        self._own = descendants(os.getpid()) - self._before
        self._vital = {process for process in self._own if name_of(process) in _VITAL}
        # Not `session_latest`, which is whichever Ray of this machine started last.
        self.logs = Path(context.address_info["session_dir"]) / "logs" / "serve"
        # On the loopback interface alone, as all of Ray's ports (ENVIRONMENT).
        self.metrics_url = f"http://127.0.0.1:{context.address_info['metrics_export_port']}/metrics"
        report(self._progress("Ray"))
        if "deployments" not in _find_application(self.plan.config):
            resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            check_resources(self.plan.args, resources)
        serve.start(
            proxy_location="HeadOnly",
            http_options=schema.http_options.model_dump(),
            # Also the controller's and the proxy's, which `deploy_apps` is too late for.
            logging_config=schema.logging_config,
            tracing_config=schema.tracing_config,
        )
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(schema)
        for stage in self._watch():
            report(self._progress(stage))
        if self.balancer is not None:
            self.balancer.start()
        self._wait_for_http()
        report(self._progress("HTTP"))

    def check(self) -> None:
        """Raise LaunchError when a process has ended without which there is no service."""
        if self._vital - descendants(os.getpid()):
            raise LaunchError(f"Ray has ended; its logs are in {self.logs}")
        if self.balancer is not None and not self.balancer.is_running:
            raise LaunchError("HAProxy has ended, so that nobody can reach the service")

    def stop(self) -> None:
        """Requests that are still being answered are cut off. Returns when the last process is gone."""
        if self._before is None:
            return
        import ray

        own = self._own or descendants(os.getpid()) - self._before
        own |= descendants(*(process.pid for process in own))
        if self.balancer is not None:
            self.balancer.stop()
        ray.shutdown()
        end(own, patience_s=_STOP_PATIENCE_S)

    def _schema(self, schema: Any) -> Any:
        try:
            return schema.model_validate(self.plan.config)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise LaunchError(f"the configuration is wrong at {where}: {first['msg']}") from None

    def _progress(self, what: str) -> Progress:
        return Progress(what, time.monotonic() - self._started)

    def _watch(self) -> Iterator[str]:
        """Names of deployments as they become ready, until all are."""
        from ray import serve

        application = _find_application(self.plan.config).get("name", "default")
        ready: set[str] = set()
        while True:
            overview = serve.status().applications.get(application)
            if overview is not None:
                deployments = overview.deployments
                for stage in sorted(set(deployments) - ready):
                    if deployments[stage].status == "HEALTHY":
                        ready.add(stage)
                        yield stage
                if overview.status == "RUNNING":
                    return
                messages = {stage: each.message for stage, each in deployments.items() if stage not in ready}
                raise_if_failed(str(overview.status.value), overview.message, messages)
            time.sleep(_POLL_S)

    def _wait_for_http(self) -> None:
        deadline = time.monotonic() + _HTTP_DEADLINE_S
        while not is_healthy(self.plan.url):
            if time.monotonic() > deadline:
                raise LaunchError(f"the stages are up, but {self.plan.url}/health does not say so")
            time.sleep(_POLL_S)


def _load_balancer(plan: LaunchPlan) -> LoadBalancer:
    application = _find_application(plan.config)
    # Serve's own section may say anything.
    most = _MANY_GATEWAYS if "deployments" in application else plan.args.gateway.max_replicas
    return load_balancer((plan.host, plan.port), application.get("name", "default"), max_gateways=most)
