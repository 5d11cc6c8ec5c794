"""The Serve configuration that `llava serve` reads: where it is, what it is without a file, and our application in it.

Knows YAML and the names of a few fields; what the settings mean is settings.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deployments.errors import LaunchError

CONFIG_FILE = "serve_config.yaml"
IMPORT_PATH = "deployments.app:build_app"
DEFAULT_CONFIG: Mapping[str, Any] = {
    "logging_config": {"enable_access_log": False},
    "applications": [{"name": "llava", "route_prefix": "/", "import_path": IMPORT_PATH}],
}


def read_config(path: Path | None) -> dict[str, Any]:
    """The file, or the one that is found; DEFAULT_CONFIG where there is none. Raises LaunchError."""
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
    """Ours among the applications. Raises LaunchError."""
    applications = content.get("applications")
    for application in applications if isinstance(applications, list) else ():
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH:
            return application
    raise LaunchError(f"the configuration names no application whose import_path is {IMPORT_PATH}")
