"""`llava serve` for one work: a command of its own on a free port, with these settings, gone when the block ends.

Knows the command and its page of metrics; not what will be asked.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.__main__ import free_port
from benchmarks.peers.checkpoints import SHAPES, write_checkpoint
from benchmarks.peers.contenders import Server, ours, running
from deployments.config_file import DEFAULT_CONFIG
from deployments.top import Page, read_page
from llava_core.checkpoints.files import DEFAULT_MODEL


@dataclass(frozen=True)
class Service:
    """It runs, and answers on `port`."""

    server: Server
    metrics_url: str

    @property
    def port(self) -> int:
        return self.server.port

    def metrics(self) -> Page:
        """What its processes last told, which each does every 10 seconds."""
        return read_page(self.metrics_url, timeout_s=30)


@contextlib.contextmanager
def serving(model: Path = DEFAULT_MODEL, args: Mapping[str, Any] | None = None) -> Iterator[Service]:
    """A service of this checkpoint, with these `args` of serve_config.yaml."""
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
    """Random weights of this size: those in `folder`, which is written where it is missing, or some for this once."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="service-"))) / size
        yield folder if folder.exists() else write_checkpoint(folder, SHAPES[size])
