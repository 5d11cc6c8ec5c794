"""Configurations and launch plans for the tests of this folder."""

from pathlib import Path
from typing import Any

import yaml

from benchmarks.ports import free_port
from deployments.launch.config_file import IMPORT_PATH
from deployments.launch.plan import LaunchPlan, plan_launch


def write_application(path: Path, **application: Any) -> Path:
    """Write a configuration with our application alone."""
    content = {"applications": [{"name": "app", "route_prefix": "/", "import_path": IMPORT_PATH, **application}]}
    path.write_text(yaml.safe_dump(content))
    return path


def add_application(config: Path) -> None:
    """Add another application, which is not ours."""
    content = yaml.safe_load(config.read_text())
    content["applications"].append({"name": "b", "route_prefix": "/b", "import_path": "b:app"})
    config.write_text(yaml.safe_dump(content))


def planned(config: Path | None = None, **options: Any) -> LaunchPlan:
    """Plan a launch on a free port."""
    return plan_launch(config, **{"port": free_port(), **options})
