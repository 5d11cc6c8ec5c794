"""Runs `llava serve` for one workload: as a separate command on a free port, stopped when the block ends.

Knows the command and its metrics page, but not the requests.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoints import SHAPES, write_checkpoint
from benchmarks.peers.contenders import Server, ours, running
from benchmarks.ports import free_port
from deployments.commands.top import Page, read_page
from deployments.launch.config_file import DEFAULT_CONFIG
from llava_core.checkpoints.files import DEFAULT_MODEL


@dataclass(frozen=True)
class Service:
    """A running service, reachable on `port`."""

    server: Server
    metrics_url: str

    @property
    def port(self) -> int:
        return self.server.port

    def metrics(self) -> Page:
        """Read the metrics that its processes last reported, which each does every 10 seconds."""
        return read_page(self.metrics_url, timeout_s=30)


@contextlib.contextmanager
def serving(model: Path = DEFAULT_MODEL, args: Mapping[str, Any] | None = None) -> Iterator[Service]:
    """Run a service with this checkpoint and these `args` of serve_config.yaml."""
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        # JSON is YAML, too.
        config, metrics_port = Path(folder) / "serve_config.yaml", free_port()
        (application,) = DEFAULT_CONFIG["applications"]
        given = {"models": [{"name": model.name, "checkpoint": str(model)}], **(args or {})}
        config.write_text(json.dumps({**DEFAULT_CONFIG, "applications": [{**application, "args": given}]}))
        contender = ours("--config", str(config), "--metrics-port", str(metrics_port))
        with running(contender, model, Path(folder)) as server:
            yield Service(server, f"http://127.0.0.1:{metrics_port}/metrics")


@contextlib.contextmanager
def checkpoint(size: str, folder: Path | None) -> Iterator[Path]:
    """Yield random weights of this size: those in `folder`, created if missing, or temporary ones without a folder."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="service-"))) / size
        yield folder if folder.exists() else write_checkpoint(folder, SHAPES[size])
