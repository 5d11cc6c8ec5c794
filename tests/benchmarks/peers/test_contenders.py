"""Minimal servers in place of real ones: started, paused, and ended with all their child processes."""

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks.peers.contenders import OURS, TRANSFORMERS, VLLM, Contender, make_contenders, running
from benchmarks.peers.vllm_setup import VERSION
from tests.deployments.service import until

# Healthy at once; its child keeps a core busy and ignores SIGTERM.
BUSY = """
import http.server, subprocess, sys
busy = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: pass"
child = subprocess.Popen([sys.executable, "-c", busy])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("about", child.pid, sys.argv[2:], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill child processes that survive their parent sooner than those of a real server."""
    monkeypatch.setattr("benchmarks.peers.contenders._PATIENCE_S", 0.2)


def contender(code: str) -> Contender:
    return Contender("a server", Path(sys.executable), ("-c", code, "PORT", "MODEL", "NAME"), "1", {"SAID": "so"})


def printed(folder: Path) -> str:
    return (folder / "a-server.log").read_text()


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_server_and_its_children_end_with_the_block(tmp_path: Path, *, is_paused: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt), running(contender(BUSY), tmp_path / "model", tmp_path) as server:
        child = int(printed(tmp_path).split()[1])
        assert f"['{tmp_path / 'model'}', 'model']" in printed(tmp_path)
        assert psutil.Process(server.process.pid).environ()["SAID"] == "so"
        assert server.model == "model"
        if is_paused:
            server.pause()
        raise KeyboardInterrupt
    assert ended(child)
    assert server.process.returncode is not None


def test_a_paused_server_takes_no_processor_time(tmp_path: Path) -> None:
    with running(contender(BUSY), tmp_path, tmp_path) as server:
        begun = server.cpu_s()
        until(lambda: server.cpu_s() > begun)
        assert server.memory_mib() > 5
        server.pause()
        both = [psutil.Process(server.process.pid), psutil.Process(int(printed(tmp_path).split()[1]))]
        until(lambda: {each.status() for each in both} == {psutil.STATUS_STOPPED})
        paused = server.cpu_s()
        # A little more than ten ticks of the clock that counts processor time.
        time.sleep(0.15)
        assert server.cpu_s() == paused
        server.resume()
        until(lambda: server.cpu_s() > paused)


def test_processor_time_of_our_own_processes_is_split(tmp_path: Path) -> None:
    with running(contender(BUSY), tmp_path, tmp_path) as server:
        assert server.cpu_of_parts_s() == {}
        server.contender = replace(server.contender, name=OURS)
        begun = server.cpu_of_parts_s()
        assert begun.keys() == {"Ray"}
        until(lambda: server.cpu_of_parts_s()["Ray"] > begun["Ray"])
    named = Contender("a server", Path(sys.executable), ("-c", BUSY, "PORT", "Generator"), "1")
    with running(replace(named, name="b"), tmp_path, tmp_path) as server:
        server.contender = replace(server.contender, name=OURS)
        assert server.cpu_of_parts_s().keys() == {"Generator", "Ray"}


def test_a_server_that_does_not_start_shows_its_last_output(tmp_path: Path) -> None:
    broken = contender("raise RuntimeError('no room')")
    with pytest.raises(SystemExit, match="no room\na server did not become ready"), running(broken, tmp_path, tmp_path):
        pass


def test_the_contenders_are_found_with_their_commands(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    (tmp_path / "lib" / "python3" / "site-packages" / f"vllm-{VERSION}.dist-info").mkdir(parents=True)
    ours, vllm, transformers = make_contenders(tmp_path)
    assert (ours.name, vllm.name, transformers.name) == (OURS, VLLM, TRANSFORMERS)
    assert ours.program.exists()
    assert transformers.program.exists()
    assert vllm.program == tmp_path / "bin" / "vllm"
    # Ray would consider paused processes dead.
    assert not ours.can_pause
    for each in (ours, vllm, transformers):
        assert os.sep not in each.command.replace("127.0.0.1", "")
