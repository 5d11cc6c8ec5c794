"""The machine that a benchmark ran on, for the JSON with its figures."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Return processor, cores and the relevant versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    names = ("ray", "torch", "transformers", "starlette")
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(models),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str | None:
    """Return a package's version, or None if it is not installed: the engine needs no service."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
