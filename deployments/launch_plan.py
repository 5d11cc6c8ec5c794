"""What is to be started: the configuration and the options that override it, all of it checked before Ray starts.

Knows files, settings and addresses. Importing this file does not import Ray, which reads its environment when it is
imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.config_file import find_application, read_config
from deployments.errors import LaunchError
from deployments.exposure import check_exposure
from deployments.model_settings import ModelArgs
from deployments.ports import check_port, choose_metrics_port, host_and_port
from deployments.preflight import FoundCheckpoint, check_checkpoints
from deployments.settings import AppArgs
from deployments.stage_settings import StageArgs
from deployments.upstream_settings import read_key, trusted

# Where Serve's own section may say anything, HAProxy looks for so many.
_MANY_GATEWAYS = 64


@dataclass(frozen=True)
class LaunchPlan:
    """What is to be started, all of it checked; `found` has the checkpoint of each model by its name."""

    config: Mapping[str, Any]
    args: AppArgs
    found: Mapping[str, FoundCheckpoint]
    host: str
    port: int
    route_prefix: str = "/"
    # 0: whichever is free.
    metrics_port: int = 0

    @property
    def url(self) -> str:
        """Where clients on this machine reach the service, its route prefix included."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{host_and_port(host, self.port)}{self.route_prefix.rstrip('/')}"

    @property
    def application(self) -> str:
        """The name of ours."""
        return str(find_application(self.config).get("name", "default"))

    @property
    def is_alone(self) -> bool:
        """Several applications share an address by their prefixes, which Serve's proxy knows and HAProxy does not."""
        return len(self.config["applications"]) == 1

    @property
    def max_gateways(self) -> int:
        """As many as HAProxy looks for."""
        return _MANY_GATEWAYS if "deployments" in find_application(self.config) else self.args.gateway.max_replicas

    @property
    def models(self) -> list[tuple[str, str, str | None, int]]:
        """Of those that have their weights here: names, checkpoints, bases, and the first model with the same settings
        of its tower. The names of stages follow from these (app.py). A request that is under way was prepared for one
        of them, and would wait in vain for a stage whose name is gone."""
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
    """Read the configuration, let the options override it, and look at settings, ports and checkpoints; of what is to
    take the place of a `running` service, also at what only a new start can change.

    Raises LaunchError, ExposureError, KeysFileError or CheckpointError, with one message that says what to do.
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
        raise LaunchError("the application has no route_prefix, so that nobody could reach it")
    for upstream in args.upstreams.values():
        read_key(upstream)
        trusted(upstream)
    found = check_checkpoints(args)
    # Its replicas are on this machine, where all of it is by now.
    given |= {"auth": args.auth.model_dump()} if args.auth.keys_file else {}
    models = [_pinned(model, found.get(model.served_name)) for model in args.models]
    application["args"] = {**given, "models": models, "offline": True}
    content["http_options"] = {**http, "host": address[0], "port": address[1]}
    plan = LaunchPlan(content, args, found, *address, prefix, metrics_port)
    if running is not None:
        _check_update(running, plan)
    return plan


def _over(base: str, models: Sequence[ModelArgs]) -> dict[str, Any]:
    """The only model as it was given, over another base."""
    if len(models) > 1:
        names = ", ".join(model.served_name for model in models)
        raise LaunchError(f"--base is for one model, and there are {names}; name it in their entries of models")
    return models[0].model_dump(exclude_unset=True) | {"base": base}


def _pinned(model: ModelArgs, found: FoundCheckpoint | None) -> dict[str, Any]:
    """The entry with all that was found out, so that its replicas need not; of an upstream, as it is."""
    if found is None:
        return model.model_dump(mode="json", exclude_unset=True)
    named = {"name": model.served_name, "checkpoint": found.model, "base": found.base}
    return model.model_dump(exclude_unset=True) | named | {"revisions": dict(found.revisions)}


def check_resources(args: AppArgs, towers: Callable[[], Mapping[str, str]], available: Mapping[str, float]) -> None:
    """Raise LaunchError when the smallest number of replicas asks for what there is not: Serve would wait for ever.

    `towers` tells which models share one (preflight.py). It takes a while, and is called only where that matters.
    """
    own = {model.served_name: model.served_name for model in args.own_models}
    if any(stage.node_labels for stage in _stages(args, own)):
        raise LaunchError(
            "node_labels are of nodes of a cluster, and this Ray has one node without any; leave them out of the "
            "configuration, or start a cluster and use `serve deploy`"
        )
    if _lacking(args, own, available) is not None and (problem := _lacking(args, towers(), available)):
        raise LaunchError(problem)


def _lacking(args: AppArgs, towers: Mapping[str, str], available: Mapping[str, float]) -> str | None:
    stages = _stages(args, towers)
    wanted = {
        "CPU": sum(stage.min_replicas * stage.num_cpus for stage in stages),
        "GPU": sum(stage.min_replicas * stage.num_gpus for stage in stages),
    }
    for name, amount in wanted.items():
        if amount > available.get(name, 0) + 1e-6:
            return (
                f"the stages ask for {amount:g} {name}s in all, and this machine has {available.get(name, 0):g}; "
                f"lower num_{name.lower()}s or min_replicas in the configuration"
            )
    return None


def _stages(args: AppArgs, towers: Mapping[str, str]) -> list[StageArgs]:
    encoders = [model.vision_encoder for model in args.own_models if model.served_name in towers.values()]
    return [args.gateway, args.preprocessor, *encoders, *(model.generator for model in args.own_models)]


def _check_update(running: LaunchPlan, changed: LaunchPlan) -> None:
    for what in ("host", "port", "application", "is_alone", "max_gateways", "models"):
        if getattr(running, what) != getattr(changed, what):
            raise LaunchError(
                "address and name of the application, whether there are others, its models and which of them have the "
                "same settings for their towers, and gateway.max_replicas are what a running service was started with; "
                "start it anew to change them"
            )


def _check_args(args: Any) -> AppArgs:
    try:
        return AppArgs.model_validate(args)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in ("args", *first["loc"]))
        raise LaunchError(f"the configuration is wrong at {where}: {first['msg']}") from None
