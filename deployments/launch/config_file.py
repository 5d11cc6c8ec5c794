"""The Serve configuration that `llava serve` reads: where it is, its default without a file, and our application in it.

Knows YAML and the names of a few fields; settings/ knows what the settings mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from deployments.errors import LaunchError

CONFIG_FILE = "serve_config.yaml"
IMPORT_PATH = "deployments.app:build_app"
DEFAULT_CONFIG: Mapping[str, Any] = {
    "logging_config": {"enable_access_log": False},
    "applications": [{"name": "llava", "route_prefix": "/", "import_path": IMPORT_PATH}],
}


def read_config(path: Path | None) -> dict[str, Any]:
    """The content of `path`, or of CONFIG_FILE if it exists, or DEFAULT_CONFIG. Raises LaunchError."""
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


def fault(error: ValidationError, *inside: str) -> LaunchError:
    """The first fault that a validation has found in a part of the configuration, as an error to raise."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, (*inside, *first["loc"])))
    what = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
    return LaunchError(f"the configuration is wrong at {where}: {what}")


def find_application(content: Mapping[str, Any]) -> dict[str, Any]:
    """Our application among those configured. Raises LaunchError."""
    applications = content.get("applications")
    for application in applications if isinstance(applications, list) else ():
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH:
            return application
    raise LaunchError(f"the configuration names no application whose import_path is {IMPORT_PATH}")
