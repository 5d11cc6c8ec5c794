"""What tests of a running service share: starting a command as a terminal does, and looking at its processes."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
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

from deployments.processes import Process, descendants, end
from deployments.top import Page, read_page
from tests.deployments.pictures import data_url
from tests.tiny import edit_json

PROGRAM = "import sys; from llava_core.cli import main; main(sys.argv[1:])"
START_S = 180.0
# Ray's processes report metrics every 10 s by default, which tests need not wait for.
TOLD_SOON = {"RAY_metrics_report_interval_ms": "1000"}


def until(condition: Callable[[], bool], *, deadline_s: float = 90.0) -> None:
    """The default deadline is generous: it only matters where the test fails, or on a busy machine."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Running:
    """A service in a process of its own."""

    url: str
    model: str
    logs: Path
    client: openai.OpenAI
    pid: int
    metrics_url: str

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=150)

    def metrics(self) -> Page:
        """The metrics that its processes reported last."""
        return read_page(self.metrics_url)

    def settled_metrics(self, check: Callable[[Page], None], *, deadline_s: float = 90.0) -> Page:
        """The first page of metrics for which no assertion of `check` fails: each process reports at its own time.

        Raises what failed last where that does not happen in time."""
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

    def log_text(self) -> str:
        # Without those of Ray's dashboard, whose ports another Ray on this machine may have.
        logs = (path for path in self.logs.rglob("*.log") if not path.name.startswith("dashboard"))
        return "\n".join(path.read_text(errors="replace") for path in logs)

    def replicas(self, stage: str) -> list[int]:
        """The processes of a stage's replicas."""
        return self.processes(f"ServeReplica:llava:{stage}")

    def processes(self, name: str) -> list[int]:
        """Those of its processes that are called so."""
        return [each.pid for each in descendants(self.pid) if name.encode() in _command(each.pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        # It has ended meanwhile.
        return b""


@contextlib.contextmanager
def _ray_files() -> Iterator[Path]:
    """Where Ray puts sockets and logs; a short path, because sockets' are limited to 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command in a terminal's place, and where its Ray keeps files; whatever it began ends with the block."""
    with _ray_files() as files:
        # A proxy that is not there: nothing on this machine may be asked through one.
        environment = {**os.environ, "RAY_TMPDIR": str(files), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        # Where its autoscaler tells of itself; two of one port would leave a traceback in the second one's log.
        environment |= {**TOLD_SOON, "AUTOSCALER_METRIC_PORT": str(free_port())}
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # So that what `select` says of the pipe is true of what `readline` can still read.
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
    """The command line of `llava serve` or `llava demo`."""
    return [sys.executable, "-c", PROGRAM, command, *arguments]


def write_config(
    checkpoint: Path, folder: Path, *, route_prefix: str = "/", options: dict[str, Any] | None = None, **args: Any
) -> Path:
    """A configuration of one application with these settings, and with these options of Serve's own beside it."""
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
    """A service of this checkpoint with these settings, until the block ends as Ctrl-C ends it, or kills it itself."""
    config = write_config(checkpoint, folder, route_prefix=route_prefix, options=options, **args)
    port = free_port()
    with started(llava("serve", "--config", str(config), "--port", str(port))) as (process, files):
        printed = read_until(process, "  logs ")
        assert "HTTP" in printed
        # Its own session's folder; all that Ray writes is what tests search.
        session = Path(printed.split()[-1]).parents[1]
        assert session.parent == files / "ray"
        assert session.is_dir()
        assert not session.is_symlink()
        metrics = next(line.split()[-1] for line in printed.splitlines() if line.startswith("  metrics "))
        url = f"http://127.0.0.1:{port}{route_prefix.rstrip('/')}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield Running(url, checkpoint.name, files / "ray", client, process.pid, metrics)
        if not is_killed:
            interrupt(process)


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does: to every process of the terminal. The command must end well, and nothing may be left of it."""
    begun = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert not alive(begun)


def alive(processes: set[Process]) -> set[Process]:
    """Those that have not ended, whoever has inherited them."""
    return processes & descendants(1)


def read_until(process: subprocess.Popen[bytes], mark: str) -> str:
    """What a starting service prints up to a line with this mark. Fails when it ends, or stays silent for too long."""
    assert process.stdout is not None
    lines: list[str] = []
    while mark not in (lines[-1] if lines else ""):
        readable, _, _ = select.select([process.stdout], [], [], START_S)
        assert readable, f"the service has stopped saying anything: {''.join(lines)}"
        lines.append(process.stdout.readline().decode())
        assert lines[-1], f"the service ended: {''.join(lines)}"
    return "".join(lines)


def long_checkpoint(tiny_checkpoint: Path, folder: Path, *, num_tokens: int = 8192) -> Path:
    """With a context that is long enough for answers that do not end while a test looks at them."""
    copy = Path(shutil.copytree(tiny_checkpoint, folder / "long-llava"))
    edit_json(copy / "config.json", lambda config: config["text_config"].update(max_position_embeddings=num_tokens))
    return copy


def content(picture: bytes, text: str) -> list[Any]:
    return [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": text}]


def messages(parts: Any) -> list[Any]:
    return [{"role": "user", "content": parts}]


def events(response: httpx.Response) -> Iterator[Any]:
    """Of a stream, as they come; the last one is the text `[DONE]` where it ends well."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
