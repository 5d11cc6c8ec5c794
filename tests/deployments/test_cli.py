"""The commands as far as they get without Ray; test_service.py runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import deployments
from deployments.cli import SCENE, curl_line, demo, serve

PROGRAM = "import sys; from deployments.cli import {0}; {0}(sys.argv[1:])"


def _run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(command), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PORT": "8123"},
    )


@pytest.mark.parametrize("command", [serve, demo])
def test_help_says_what_it_does(command: object) -> None:
    result = CliRunner().invoke(command, ["--help"])  # type: ignore[arg-type]
    assert result.exit_code == 0
    assert "--port" in result.output
    assert "--model" in result.output


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_missing_checkpoint_is_one_line_and_status_1(command: str, tmp_path: Path) -> None:
    image = tmp_path / "x.png"
    image.write_bytes(b"x")
    options = ["--image", str(image)] if command == "demo" else []
    result = _run(command, "--model", "/nowhere/llava", *options)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "/nowhere/llava" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_curl_line_sends_what_the_demo_sends(tmp_path: Path) -> None:
    """Run by a shell, with a curl of our own that shows what it was given."""
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


def test_the_demos_picture_comes_with_the_package_and_stands_in_the_examples_once() -> None:
    assert SCENE.parent == Path(deployments.__file__).parent
    example = Path(__file__).parents[2] / "examples" / "scene.png"
    assert example.is_symlink()
    assert example.resolve() == SCENE
    with Image.open(SCENE) as picture:
        assert picture.size >= (128, 128)


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_download_is_announced_before_it_begins(command: str) -> None:
    result = _run(command, "--model", "owner/there-is-no-such-model")
    assert result.returncode == 1
    assert result.stdout.startswith("owner/there-is-no-such-model is no folder here: downloading")
    assert "neither a folder here nor in the hub's local cache" in result.stderr
