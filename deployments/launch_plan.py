"""What is to be started: the configuration and the options that override it, all of it checked before Ray starts.

Knows files, settings and addresses. Importing this file does not import Ray, which reads its environment when it is
imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.errors import LaunchError
from deployments.exposure import check_exposure
from deployments.model_settings import ModelArgs
from deployments.ports import check_port, choose_metrics_port
from deployments.preflight import FoundCheckpoint, check_checkpoints
from deployments.settings import AppArgs

CONFIG_FILE = "serve_config.yaml"
IMPORT_PATH = "deployments.app:build_app"
DEFAULT_CONFIG: Mapping[str, Any] = {
    "logging_config": {"enable_access_log": False},
    "applications": [{"name": "llava", "route_prefix": "/", "import_path": IMPORT_PATH}],
}


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
    """Read the configuration, let the options override it, and look at settings, ports and checkpoints.

    Raises LaunchError, ExposureError, KeysFileError or CheckpointError, with one message that says what to do.
    """
    content = _read_config(config)
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
    check_port(*address)
    metrics_port = choose_metrics_port(address[1], metrics_port)
    prefix = application.get("route_prefix", "/")
    if not prefix:
        raise LaunchError("the application has no route_prefix, so that nobody could reach it")
    found = check_checkpoints(args)
    # Its replicas are on this machine, where all of it is by now.
    given |= {"auth": args.auth.model_dump()} if args.auth.keys_file else {}
    models = [_pinned(model, found[model.served_name]) for model in args.models]
    application["args"] = {**given, "models": models, "offline": True}
    content["http_options"] = {**http, "host": address[0], "port": address[1]}
    return LaunchPlan(content, args, found, *address, prefix, metrics_port)


def _over(base: str, models: Sequence[ModelArgs]) -> dict[str, Any]:
    """The only model as it was given, over another base."""
    if len(models) > 1:
        names = ", ".join(model.served_name for model in models)
        raise LaunchError(f"--base is for one model, and there are {names}; name it in their entries of models")
    return models[0].model_dump(exclude_unset=True) | {"base": base}


def _pinned(model: ModelArgs, found: FoundCheckpoint) -> dict[str, Any]:
    """The entry with all that was found out, so that its replicas need not."""
    named = {"name": model.served_name, "checkpoint": found.model, "base": found.base}
    return model.model_dump(exclude_unset=True) | named | {"revisions": dict(found.revisions)}


def check_resources(args: AppArgs, towers: Callable[[], Mapping[str, str]], available: Mapping[str, float]) -> None:
    """Raise LaunchError when the smallest number of replicas asks for more than there is: Serve would wait for ever.

    `towers` tells which models share one (preflight.py). It takes a while, and is called only where that matters.
    """
    own = {model.served_name: model.served_name for model in args.models}
    if _lacking(args, own, available) is not None and (problem := _lacking(args, towers(), available)):
        raise LaunchError(problem)


def _lacking(args: AppArgs, towers: Mapping[str, str], available: Mapping[str, float]) -> str | None:
    encoders = [model.vision_encoder for model in args.models if model.served_name in towers.values()]
    stages = [args.gateway, args.preprocessor, *encoders, *(model.generator for model in args.models)]
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


def find_application(content: Mapping[str, Any]) -> dict[str, Any]:
    """The application of this project in a Serve configuration. Raises LaunchError when there is none."""
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
