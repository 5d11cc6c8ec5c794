"""The servers that are compared, each started by its own command and stopped with all its processes.

Knows commands, ports and processes; neither checkpoints nor loads. An idle server is paused where it tolerates that, so
that it takes no processor time from the one being measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.__main__ import wait_until_healthy
from benchmarks.peers import vllm_setup
from benchmarks.ports import free_port
from deployments.launch.processes import descendants, end

ROOT = Path(__file__).parents[2]
OURS, VLLM, TRANSFORMERS = "llava-serve", "vLLM", "transformers serve"
_PARTS = ("Gateway", "Preprocessor", "VisionEncoder", "Generator", "haproxy")
# Time for a server to become ready; for its main process to end; and for the processes it started to follow.
_START_S, _STOP_S, _PATIENCE_S = 600.0, 60.0, 5.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Contender:
    """A server. MODEL, NAME and PORT in its command stand for the checkpoint's folder, its name, and a free port."""

    name: str
    program: Path
    arguments: tuple[str, ...]
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    # The model's name in requests.
    model: str = "NAME"
    # May be stopped (SIGSTOP) while others are measured. Ray's processes take silence for death.
    can_pause: bool = True
    # Answers one request after the other, so that with more clients they only wait longer.
    one_at_a_time: bool = False

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*settings, self.program.name, *self.arguments])


def make_contenders(vllm_venv: Path) -> list[Contender]:
    """Return all contenders with their default settings, in bfloat16; vLLM is installed if missing."""
    here = Path(sys.executable).parent
    vllm = vllm_setup.ensure_vllm(vllm_venv)
    return [
        ours("--model", "MODEL"),
        Contender(
            VLLM,
            vllm,
            (
                *"serve MODEL --served-model-name NAME --host 127.0.0.1 --port PORT --dtype bfloat16".split(),
                "--max-model-len",
                "2048",
            ),
            f"{vllm_setup.VERSION}+cpu",
            {"VLLM_CPU_KVCACHE_SPACE": "4"},
        ),
        # Neither of its options for speed applies: continuous batching does not support models with pictures, and
        # --compile compiles nothing on a CPU.
        Contender(
            TRANSFORMERS,
            here / "transformers",
            tuple("serve MODEL --host 127.0.0.1 --port PORT --dtype bfloat16".split()),
            version("transformers"),
            model="MODEL",
            one_at_a_time=True,
        ),
    ]


def ours(*options: str) -> Contender:
    """Return `llava serve` with these options."""
    program = Path(sys.executable).parent / "llava"
    return Contender(OURS, program, ("serve", *options, "--port", "PORT"), version("llava-serve"), can_pause=False)


@dataclass
class Server:
    """A running contender."""

    contender: Contender
    process: subprocess.Popen[bytes]
    port: int
    model: str
    start_s: float = 0.0

    def pause(self) -> None:
        if self.contender.can_pause:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        if self.contender.can_pause:
            os.killpg(self.process.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """Return the processor time of all its processes so far, including those that have ended."""
        return cpu_s(self.process.pid)

    def cpu_of_parts_s(self) -> dict[str, float]:
        """Return the same for llava-serve's processes, by part; whatever belongs to no stage counts as Ray's."""
        spent: dict[str, float] = {}
        for process in self.processes() if self.contender.name == OURS else []:
            with contextlib.suppress(psutil.Error):
                part, times = part_of(process) or "Ray", process.cpu_times()
                spent[part] = spent.get(part, 0.0) + times.user + times.system
        return spent

    def memory_mib(self) -> float:
        """Return its resident memory, with pages shared by several processes divided among them."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return round(total / 2**20)

    def processes(self) -> list[psutil.Process]:
        """Return all its live processes."""
        return _tree(self.process.pid)


def part_of(process: psutil.Process) -> str | None:
    """Return which part of llava-serve a process is; None for Ray's. Raises psutil.Error if it has ended."""
    command = " ".join(process.cmdline())
    return next((name for name in _PARTS if name in command), None)


@contextlib.contextmanager
def running(contender: Contender, folder: Path, logs: Path) -> Iterator[Server]:
    """Yield a server for the checkpoint in `folder`; it is stopped when the block ends, however it ends."""
    port = free_port()
    meant = {"MODEL": str(folder), "NAME": folder.name, "PORT": str(port)}
    command = [str(contender.program), *(meant.get(word, word) for word in contender.arguments)]
    # Nothing may be downloaded. llava-serve runs from this working tree, not as installed.
    environment = own_threads() | {"HF_HUB_OFFLINE": "1", **contender.environment}
    environment.pop("PYTHONPATH", None)
    if contender.name == OURS:
        environment["PYTHONPATH"] = str(ROOT)
    log = logs / f"{contender.name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        # In its own session: Ctrl-C is for this process, which stops the servers in order. Not in the repository, whose
        # serve_config.yaml may have been changed.
        process = subprocess.Popen(
            command, cwd=logs, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        server = Server(contender, process, port, meant.get(contender.model, contender.model))
        server.start_s = _wait_until_healthy(server, log)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate a server like `kill`, and force any of its processes that do not follow."""
    began = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    # Only its main process, which ends the others in order. Not by SIGINT, which background jobs of a shell, and their
    # children, ignore.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    process.kill()
    process.wait()
    end(began, patience_s=_PATIENCE_S)


def own_threads() -> dict[str, str]:
    """Return the environment for processes that choose their own thread counts, without this process's choice."""
    return {name: value for name, value in os.environ.items() if name not in _THREADS}


def cpu_s(pid: int) -> float:
    total = 0.0
    for process in _tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _wait_until_healthy(server: Server, log: Path) -> float:
    begun, url = time.monotonic(), f"http://127.0.0.1:{server.port}"
    try:
        wait_until_healthy(url, server.process, name=server.contender.name, timeout_s=_START_S)
    except SystemExit as error:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise SystemExit("\n".join([*lines[-20:], str(error)])) from None
    return round(time.monotonic() - begun, 1)
