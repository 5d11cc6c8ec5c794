"""The servers that are compared, each started by its own command and ended with everything it began.

Knows commands, ports and processes; neither checkpoints nor loads. A server that is not being asked is stopped where it
bears that, so that it takes no processor time from the one that is.
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

from benchmarks.__main__ import free_port, wait_until_healthy
from benchmarks.peers import vllm_setup
from deployments.processes import descendants, end

ROOT = Path(__file__).parents[2]
OURS, VLLM, TRANSFORMERS = "llava-serve", "vLLM", "transformers serve"
_PARTS = ("Gateway", "Preprocessor", "VisionEncoder", "Generator", "haproxy")
# Until it is ready; until its first process has ended; and until those that it began have followed.
_START_S, _STOP_S, _PATIENCE_S = 600.0, 60.0, 5.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Contender:
    """A server: MODEL, NAME and PORT in its command stand for the checkpoint's folder, its name, and a free port."""

    name: str
    program: Path
    arguments: tuple[str, ...]
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    # What requests call the model.
    model: str = "NAME"
    # May be stopped while others are asked. Ray's processes take silence for death.
    can_pause: bool = True
    # Answers one request after the other, so that more clients wait longer and learn nothing new.
    one_at_a_time: bool = False

    @property
    def command(self) -> str:
        """As somebody else would type it."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*settings, self.program.name, *self.arguments])


def make_contenders(vllm_venv: Path) -> list[Contender]:
    """All of them with their default settings, in bfloat16; vLLM is set up where it is missing."""
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
        # Neither of its options for speed is for this: continuous batching leaves models with pictures out, and
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
    """`llava serve` with these options."""
    program = Path(sys.executable).parent / "llava"
    return Contender(OURS, program, ("serve", *options, "--port", "PORT"), version("llava-serve"), can_pause=False)


@dataclass
class Server:
    """A contender that runs."""

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
        """Processor time of all its processes so far, of those that have ended too."""
        return cpu_s(self.process.pid)

    def cpu_of_parts_s(self) -> dict[str, float]:
        """The same of llava-serve's own processes, by what they are; what is none of the stages' is Ray's."""
        spent: dict[str, float] = {}
        for process in self.processes() if self.contender.name == OURS else []:
            with contextlib.suppress(psutil.Error):
                part, times = part_of(process) or "Ray", process.cpu_times()
                spent[part] = spent.get(part, 0.0) + times.user + times.system
        return spent

    def memory_mib(self) -> float:
        """Resident, with what several of its processes share divided among them."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return round(total / 2**20)

    def processes(self) -> list[psutil.Process]:
        """All of them that are there."""
        return _tree(self.process.pid)


def part_of(process: psutil.Process) -> str | None:
    """Which part of llava-serve it is; None where it is Ray's. Raises psutil.Error when it is gone."""
    command = " ".join(process.cmdline())
    return next((name for name in _PARTS if name in command), None)


@contextlib.contextmanager
def running(contender: Contender, folder: Path, logs: Path) -> Iterator[Server]:
    """A server that answers for the checkpoint in `folder`; gone when the block ends, however it ends."""
    port = free_port()
    meant = {"MODEL": str(folder), "NAME": folder.name, "PORT": str(port)}
    command = [str(contender.program), *(meant.get(word, word) for word in contender.arguments)]
    # Nothing is to be fetched. Of ours the code beside this file runs, not what is installed.
    environment = own_threads() | {"HF_HUB_OFFLINE": "1", **contender.environment}
    environment.pop("PYTHONPATH", None)
    if contender.name == OURS:
        environment["PYTHONPATH"] = str(ROOT)
    log = logs / f"{contender.name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C is for this process, which ends the servers in order. Not in the repository,
        # whose serve_config.yaml may have been changed.
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
    """End a server as `kill` does, and whatever of it does not follow by force."""
    began = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    # Its first process alone: that is the one which ends the others in order. Not by SIGINT, which is ignored below
    # whatever a shell has started in the background.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    process.kill()
    process.wait()
    end(began, patience_s=_PATIENCE_S)


def own_threads() -> dict[str, str]:
    """The environment for processes that choose their threads themselves, whatever was chosen for this one."""
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
