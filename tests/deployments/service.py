"""Helpers for tests of a running service: starting a command like a terminal, and inspecting its processes."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from benchmarks.ports import free_port
from deployments.commands.top import MetricsPageError, Page, read_page
from deployments.launch.processes import Process, descendants, end
from tests.deployments.pictures import data_url
from tests.tiny import edit_json

PROGRAM = "import sys; from llava_core.cli import main; main(sys.argv[1:])"
START_S = 180.0
# Longer than anything takes, even if the host pauses this machine for half a minute.
_BUSY_S = 120.0
# Ray's processes report metrics every 10 s by default, which tests need not wait for.
FREQUENT_METRICS = {"RAY_metrics_report_interval_ms": "1000"}


def until(condition: Callable[[], bool], *, deadline_s: float = 90.0) -> None:
    """The default deadline is generous: it only matters where the test fails, or on a busy machine."""
    assert comes_true(condition, deadline_s=deadline_s), "the condition was not met in time"


def comes_true(condition: Callable[[], bool], *, deadline_s: float) -> bool:
    """Return whether the condition is met before the deadline."""
    deadline = time.monotonic() + deadline_s
    while not (is_met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_met


@dataclass
class Running:
    """A service in a separate process."""

    url: str
    model: str
    logs: Path
    client: openai.OpenAI
    pid: int
    metrics_url: str
    process: subprocess.Popen[bytes]

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=150)

    def metrics(self) -> Page:
        """The metrics that its processes reported last. Reading them may take long on a busy machine, where Ray's
        agent has also been seen to answer once with 500."""
        try:
            return read_page(self.metrics_url, timeout_s=_BUSY_S)
        except MetricsPageError:
            return read_page(self.metrics_url, timeout_s=_BUSY_S)

    def settled_metrics(self, check: Callable[[Page], None], *, deadline_s: float = 90.0) -> Page:
        """Return the first metrics for which `check` raises no AssertionError; every process reports at its own time.

        Raises the last AssertionError at the deadline.
        """
        deadline = time.monotonic() + deadline_s
        while True:
            page = self.metrics()
            try:
                check(page)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return page

    def printed(self) -> str:
        """What the command has printed since the last call."""
        assert self.process.stdout is not None
        lines = []
        while select.select([self.process.stdout], [], [], 0)[0]:
            lines.append(self.process.stdout.readline().decode())
            assert lines[-1], f"the service ended: {''.join(lines)}"
        return "".join(lines)

    def log_text(self) -> str:
        # Without logs of Ray's dashboard, whose ports another Ray on this machine may use.
        logs = (path for path in self.logs.rglob("*.log") if not path.name.startswith("dashboard"))
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def replicas(self, stage: str) -> list[int]:
        """Return the pids of a stage's replicas."""
        return self.processes(f"ServeReplica:llava:{stage}")

    def processes(self, name: str) -> list[int]:
        """Return the pids of its processes with this name."""
        return [each.pid for each in descendants(self.pid) if name.encode() in _command(each.pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        # The process has ended meanwhile.
        return b""


@contextlib.contextmanager
def _ray_files() -> Iterator[Path]:
    """Yield a folder for Ray's sockets and logs; a short path, because socket paths are limited to 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run a command as from a terminal; yields its process and the folder of its Ray's files. All its processes end
    with the block."""
    with _ray_files() as files:
        # A proxy that does not exist: nothing on this machine may be requested through one.
        environment = {**os.environ, "RAY_TMPDIR": str(files), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        # The port of its autoscaler's metrics: a second Ray with the same port would log a traceback.
        environment |= {**FREQUENT_METRICS, "AUTOSCALER_METRIC_PORT": str(free_port())}
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Unbuffered, so that `select` on the pipe knows everything that `readline` can still read.
            bufsize=0,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                yield process, files
            finally:
                end(descendants(process.pid), patience_s=0.0)
                process.kill()


def llava(command: str, *arguments: str) -> list[str]:
    """Return the command line of `llava serve` or `llava demo`."""
    return [sys.executable, "-c", PROGRAM, command, *arguments]


def write_config(
    checkpoint: Path, folder: Path, *, route_prefix: str = "/", options: dict[str, Any] | None = None, **args: Any
) -> Path:
    """Write a configuration of one application with these settings, plus these options of Serve itself."""
    application = {"name": "llava", "route_prefix": route_prefix, "import_path": "deployments.app:build_app"}
    config = folder / "config.yaml"
    applications = [{**application, "args": {"models": [{"checkpoint": str(checkpoint)}], **args}}]
    config.write_text(yaml.safe_dump({**(options or {}), "applications": applications}))
    return config


@contextlib.contextmanager
def serving(
    checkpoint: Path,
    folder: Path,
    *,
    route_prefix: str = "/",
    options: dict[str, Any] | None = None,
    is_killed: bool = False,
    **args: Any,
) -> Iterator[Running]:
    """Run a service with this checkpoint and these settings; the end of the block stops it like Ctrl-C, unless the
    block has killed it."""
    config = write_config(checkpoint, folder, route_prefix=route_prefix, options=options, **args)
    port = free_port()
    with started(llava("serve", "--config", str(config), "--port", str(port))) as (process, files):
        printed = read_until(process, "  logs ")
        assert "HTTP" in printed
        # The folder of its own session: tests search everything that Ray writes there.
        session = Path(printed.split()[-1]).parents[1]
        assert session.parent == files / "ray"
        assert session.is_dir()
        assert not session.is_symlink()
        metrics = next(line.split()[-1] for line in printed.splitlines() if line.startswith("  metrics "))
        url = f"http://127.0.0.1:{port}{route_prefix.rstrip('/')}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield Running(url, checkpoint.name, files / "ray", client, process.pid, metrics, process)
        if not is_killed:
            interrupt(process)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Interrupt every process of the terminal, like Ctrl-C. The command must succeed and leave no process behind."""
    begun = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(_BUSY_S) == 0
    assert not alive(begun)


def alive(processes: set[Process]) -> set[Process]:
    """Return those that have not ended, even if they were re-parented."""
    return processes & descendants(1)


def read_until(process: subprocess.Popen[bytes], mark: str) -> str:
    """Return a starting service's output up to a line with this mark. Fails when it ends, or is silent for too long."""
    assert process.stdout is not None
    lines: list[str] = []
    while mark not in (lines[-1] if lines else ""):
        readable, _, _ = select.select([process.stdout], [], [], START_S)
        assert readable, f"the service has stopped saying anything: {''.join(lines)}"
        lines.append(process.stdout.readline().decode())
        assert lines[-1], f"the service ended: {''.join(lines)}"
    return "".join(lines)


def long_checkpoint(tiny_checkpoint: Path, folder: Path, *, num_tokens: int = 8192) -> Path:
    """Write a checkpoint whose context is long enough for answers that outlast a test's observations."""
    copy = Path(shutil.copytree(tiny_checkpoint, folder / "long-llava"))
    edit_json(copy / "config.json", lambda config: config["text_config"].update(max_position_embeddings=num_tokens))
    return copy


def content(picture: bytes, text: str) -> list[Any]:
    return [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": text}]


def messages(parts: Any) -> list[Any]:
    return [{"role": "user", "content": parts}]


def events(response: httpx.Response) -> Iterator[Any]:
    """Yield a stream's events as they arrive; the last one is the text `[DONE]` if it ends well."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
