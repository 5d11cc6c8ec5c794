"""The commands as far as they get without Ray; test_service.py runs them."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import deployments
from benchmarks.ports import free_port
from deployments.commands.serve import SCENE, _drain, curl_line, demo, serve
from deployments.launch.launcher import LocalService
from deployments.launch.load_balancer import LoadBalancer, local_host
from deployments.launch.plan import plan_launch
from tests.hub import OLD, hub_of

PROGRAM = "import sys; from llava_core.cli import main; main(sys.argv[1:])"


def _run(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, command, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PORT": "8123", **environment},
    )


@pytest.mark.parametrize("command", [serve, demo])
def test_help_lists_the_options(command: object) -> None:
    result = CliRunner().invoke(command, ["--help"])  # type: ignore[arg-type]
    assert result.exit_code == 0
    assert "--port" in result.output
    assert "--offline" in result.output
    assert "--model" in result.output


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_missing_checkpoint_is_a_one_line_error_with_status_1(command: str, tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(b"x")
    options = ["--image", str(image)] if command == "demo" else []
    result = _run(command, "--model", "/nowhere/llava", *options)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "/nowhere/llava" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_curl_line_sends_the_same_request_as_the_demo(tmp_path: Path) -> None:
    """A shell runs it with a fake curl that prints its arguments."""
    image = tmp_path / "it's a scene.png"
    image.write_bytes(bytes(range(256)) * 1000)
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\ncat\n")
    curl.chmod(0o755)
    question = 'What\'s 100% "red"; base64,%s?\n$HOME'
    line = curl_line("http://127.0.0.1:1", image, question, "m")
    path = f"{tmp_path}:{os.environ['PATH']}"
    shown = subprocess.run(["sh", "-c", line], capture_output=True, timeout=30, check=True, env={"PATH": path})
    body = json.loads(shown.stdout)
    picture, text = body["messages"][0]["content"]
    assert text["text"] == question
    assert picture["image_url"]["url"].startswith("data:image/png;base64,AAECAw")
    assert (body["model"], body["stream"]) == ("m", True)


def test_the_demos_picture_is_in_the_package_and_linked_from_the_examples() -> None:
    assert SCENE.parent == Path(deployments.__file__).parent
    example = Path(__file__).parents[3] / "examples" / "scene.png"
    assert example.is_symlink()
    assert example.resolve() == SCENE
    with Image.open(SCENE) as picture:
        assert picture.size >= (128, 128)


def test_a_download_is_announced_first_and_offline_nothing_is_downloaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A fault in the checkpoint ends the start after the download."""
    broken = Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))
    (broken / "tokenizer.json").unlink()
    with hub_of({"owner/name": {OLD: broken}}) as hub:
        client = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        result = _run("serve", "--model", "owner/name", "--offline", **client)
        assert (result.returncode, result.stdout, hub.asked) == (1, "", [])
        assert result.stderr.startswith("Error: owner/name, the model, is neither a folder here nor in the hub's local")
        result = _run("serve", "--model", "owner/name", **client)
        assert "model.safetensors" in hub.sent
    assert result.stderr.startswith("owner/name, the model: downloading")
    assert "tokenizer.json is missing" in result.stderr


def test_a_reader_that_is_gone_does_not_end_the_service() -> None:
    printing = "with _terminal() as terminal: _say(terminal, 'a'), _say(terminal, 'b')"
    command = [sys.executable, "-c", f"from deployments.commands.serve import _say, _terminal\n{printing}"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        finished = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (finished.returncode, finished.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("ends", "expected"), [(True, ""), (False, "Some are unfinished.\n"), (KeyboardInterrupt(), "")]
)
def test_a_second_signal_stops_waiting_for_requests_in_flight(
    *, ends: bool | BaseException, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = LocalService(plan_launch(model=None, port=free_port(), metrics_port=0))
    terminal = io.StringIO()
    service.balancer = LoadBalancer(("127.0.0.1", 1), local_host(1), [30_000], "llava")

    def drain(_self: LoadBalancer, seconds: float) -> bool:
        assert seconds == 7
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setattr(LoadBalancer, "drain", drain)
    _drain(service, 7, terminal)
    assert terminal.getvalue() == f"\nWaiting up to 7 s for requests to finish. Ctrl-C cuts them off.\n{expected}"
