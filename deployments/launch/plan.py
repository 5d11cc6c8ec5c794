"""What to start: the configuration and the options that override it, all checked before Ray starts.

Knows files, settings and addresses. Importing this file does not import Ray, which reads its environment on import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.access.exposure import check_exposure
from deployments.errors import LaunchError
from deployments.launch.config_file import fault, find_application, read_config
from deployments.ports import check_port, choose_metrics_port, host_and_port
from deployments.preflight import check_checkpoints
from deployments.settings.app import AppArgs
from deployments.settings.models import ModelArgs
from deployments.settings.upstreams import read_key, trusted
from llava_core.checkpoints.found import FoundCheckpoint

# How many gateways HAProxy expects at most where Serve's own `deployments` section may set their number.
_MANY_GATEWAYS = 64


@dataclass(frozen=True)
class LaunchPlan:
    """What to start, all of it checked. `found` maps each model's name to its checkpoint."""

    config: Mapping[str, Any]
    args: AppArgs
    found: Mapping[str, FoundCheckpoint]
    host: str
    port: int
    route_prefix: str = "/"
    # 0: any free port.
    metrics_port: int = 0

    @property
    def url(self) -> str:
        """The service's address for clients on this machine, including its route prefix."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{host_and_port(host, self.port)}{self.route_prefix.rstrip('/')}"

    @property
    def application(self) -> str:
        """The name of the Serve application."""
        return str(find_application(self.config).get("name", "default"))

    @property
    def is_alone(self) -> bool:
        """Whether it is the only application. Several share an address by prefix, which takes Serve's proxy."""
        return len(self.config["applications"]) == 1

    @property
    def max_gateways(self) -> int:
        """The most gateways that HAProxy will look for."""
        return _MANY_GATEWAYS if "deployments" in find_application(self.config) else self.args.gateway.max_replicas

    @property
    def models(self) -> list[tuple[str, str, str | None, int]]:
        """For each model whose weights are served here: name, checkpoint, base, and the index of the first model with
        the same tower settings.

        The names of the stages derive from these (deployments/app.py). They must not change in an update: a request in
        flight would wait in vain for a stage that was renamed.
        """
        own = self.args.own_models
        settings = [model.vision_encoder for model in own]
        return [
            (model.served_name, model.source, model.base_source, settings.index(model.vision_encoder)) for model in own
        ]


def plan_launch(
    config: Path | None = None,
    *,
    model: str | None = None,
    base: str | None = None,
    host: str | None = None,
    port: int | None = None,
    metrics_port: int | None = None,
    offline: bool = False,
    running: LaunchPlan | None = None,
) -> LaunchPlan:
    """Read the configuration, apply the options, and check settings, ports and checkpoints. For an update of a
    `running` service, also check that nothing changes that needs a restart.

    Raises LaunchError, ExposureError, KeysFileError or CheckpointError, whose message says what to do.
    """
    content = read_config(config)
    application = find_application(content)
    given = dict(application.get("args") or {})
    if model is not None:
        given["models"] = [{"checkpoint": model}]
    if offline:
        given["offline"] = True
    args = _check_args(given)
    if base is not None:
        given["models"] = [_over(base, args.models)]
        args = _check_args(given)
    http = dict(content.get("http_options") or {})
    address = host or http.get("host", "127.0.0.1"), port or http.get("port", 8000)
    check_exposure(address[0], args.auth)
    if running is None:
        check_port(*address)
    metrics_port = choose_metrics_port(address[1], metrics_port) if running is None else running.metrics_port
    prefix = application.get("route_prefix", "/")
    if not prefix:
        raise LaunchError("the application has no route_prefix, so it could not be reached")
    for upstream in args.upstreams.values():
        read_key(upstream)
        trusted(upstream)
    found = check_checkpoints(args)
    # The replicas run on this machine, where everything has been downloaded by now.
    given |= {"auth": args.auth.model_dump()} if args.auth.keys_file else {}
    models = [_pinned(model, found.get(model.served_name)) for model in args.models]
    application["args"] = {**given, "models": models, "offline": True}
    content["http_options"] = {**http, "host": address[0], "port": address[1]}
    plan = LaunchPlan(content, args, found, *address, prefix, metrics_port)
    if running is not None:
        _check_update(running, plan)
    return plan


def _over(base: str, models: Sequence[ModelArgs]) -> dict[str, Any]:
    """The configured model with another base. Raises LaunchError when there are several models."""
    if len(models) > 1:
        names = ", ".join(model.served_name for model in models)
        raise LaunchError(f"--base is for one model, and there are {names}; name it in their entries of models")
    return models[0].model_dump(exclude_unset=True) | {"base": base}


def _pinned(model: ModelArgs, found: FoundCheckpoint | None) -> dict[str, Any]:
    """The entry with everything resolved, so that replicas need not look it up; an upstream's entry is unchanged."""
    if found is None:
        return model.model_dump(mode="json", exclude_unset=True)
    named = {"name": model.served_name, "checkpoint": found.model, "base": found.base}
    return model.model_dump(exclude_unset=True) | named | {"revisions": dict(found.revisions)}


def _check_update(running: LaunchPlan, changed: LaunchPlan) -> None:
    for what in ("host", "port", "application", "is_alone", "max_gateways", "models"):
        if getattr(running, what) != getattr(changed, what):
            raise LaunchError(
                "a running service cannot change its address, the name of the application, whether there are other "
                "applications, gateway.max_replicas, its models or which of them have the same tower settings; "
                "restart it to change them"
            )


def _check_args(args: Any) -> AppArgs:
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        raise fault(error, "args") from None
