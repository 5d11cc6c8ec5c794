"""The default model as a person would try it: questions about pictures drawn here with plain Pillow, in process and
over HTTP, and every command and code block of the README."""

import base64
import functools
import io
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from PIL import Image, ImageDraw, ImageFont

from benchmarks.ports import free_port
from llava_core.evaluation.task import normalise
from llava_core.inference import DEFAULT_MODEL, LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.page.browsing import serving_page
from tests.deployments.service import START_S

# The first test that asks the service waits for it to start.
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[1]
LLAVA = Path(sys.executable).parent / "llava"
Draw = Callable[[ImageDraw.ImageDraw], object]


def circle(x: int, y: int, radius: int, colour: str) -> Draw:
    return lambda canvas: canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def square(x: int, y: int, half: int, colour: str) -> Draw:
    return lambda canvas: canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)


def triangle(x: int, y: int, half: int, colour: str) -> Draw:
    return lambda canvas: canvas.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=colour)


def printed(text: str, x: int, y: int, size: int, colour: str) -> Draw:
    return lambda canvas: canvas.text((x, y), text, fill=colour, font=ImageFont.load_default(size), anchor="mm")


# Size, background, shapes, question, answer.
SCENES: list[tuple[tuple[int, int], str, list[Draw], str, str]] = [
    ((200, 200), "white", [circle(100, 100, 40, "red")], "What colour is the circle?", "red"),
    ((320, 240), "white", [square(70, 60, 25, "blue")], "What shape is the blue object?", "square"),
    ((300, 300), "lightgray", [triangle(240, 240, 35, "green")], "Where is the triangle?", "bottom right"),
    (
        (400, 300),
        "white",
        [circle(80, 80, 30, "red"), circle(300, 200, 30, "blue")],
        "How many circles are there?",
        "2",
    ),
    ((256, 256), "black", [square(128, 128, 45, "yellow")], "Is there a yellow square?", "yes"),
    (
        (300, 200),
        "white",
        [circle(60, 99, 20, "red"), square(230, 99, 20, "blue")],
        "Do the circle and the square have the same colour?",
        "no",
    ),
    ((500, 400), "white", [circle(250, 200, 90, "orange")], "Is the circle small or large?", "large"),
    ((256, 256), "white", [square(60, 60, 30, "purple")], "Is there a red circle?", "no"),
    ((300, 200), "white", [circle(50, 100, 22, "red")], "Where is the red circle?", "left"),
    ((640, 480), "white", [square(320, 240, 60, "black")], "Which colour is the square?", "black"),
]


def picture(size: tuple[int, int], background: str, shapes: list[Draw]) -> bytes:
    image = Image.new("RGB", size, background)
    for draw in shapes:
        draw(ImageDraw.Draw(image))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return LocalModel()


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene[3]} {scene[4]}")
def test_known_scenes_are_answered_correctly_in_process(
    local: LocalModel, scene: tuple[tuple[int, int], str, list[Draw], str, str]
) -> None:
    *drawn, question, expected = scene
    parts = (ImagePart(picture(*drawn)), TextPart(question))
    deltas = local.stream(GenerationRequest("scene", (Message("user", parts),), SamplingParams(max_tokens=40)))
    assert normalise("".join(delta.text for delta in deltas)) == expected


def test_the_checkpoint_is_small_and_has_a_model_card() -> None:
    sizes = {path.name: path.stat().st_size for path in DEFAULT_MODEL.iterdir()}
    assert sum(sizes.values()) <= 16_000_000
    assert sizes["README.md"] > 1000


@pytest.fixture(scope="module")
def service_url() -> Iterator[str]:
    """`llava serve` as the README starts it, on a free port."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    command = [str(LLAVA), "serve", "--port", port]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as service:
        try:
            deadline = time.monotonic() + START_S
            while not is_healthy(url):
                assert service.poll() is None, service.communicate()[0]
                assert time.monotonic() < deadline, "the service did not become ready in time"
                time.sleep(0.1)
            yield url
        finally:
            service.send_signal(signal.SIGINT)
            service.communicate(timeout=60)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return False
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.mark.ray
def test_known_scenes_are_answered_correctly_by_the_service_concurrently(service_url: str) -> None:
    def ask(client: OpenAI, scene: tuple[tuple[int, int], str, list[Draw], str, str]) -> str:
        *drawn, question, _ = scene
        data = base64.b64encode(picture(*drawn)).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        message = {"role": "user", "content": [image, {"type": "text", "text": question}]}
        reply = client.chat.completions.create(model="scenes-llava", messages=[message])  # type: ignore[list-item]
        return normalise(reply.choices[0].message.content or "")

    with OpenAI(base_url=f"{service_url}/v1", api_key="unused", max_retries=0) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(functools.partial(ask, client), SCENES))
    assert answers == [scene[4] for scene in SCENES]


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.ray
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_readmes_python_runs_and_prints_an_answer(service_url: str, number: int) -> None:
    code = blocks("python")[number].replace("http://127.0.0.1:8000", service_url)
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip()


def commands() -> list[str]:
    """Return every command line of the README's shell blocks, without its comment."""
    lines = (line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return [line for line in lines if line]


def is_page(command: str) -> bool:
    return command.startswith(".venv/bin/llava page")


@pytest.mark.ray
def test_the_readmes_page_runs_until_ctrl_c(service_url: str) -> None:
    [command] = filter(is_page, commands())
    assert shlex.split(command.replace("http://127.0.0.1:8000", service_url))[2:] == ["--url", service_url]
    with serving_page(service_url) as url, urllib.request.urlopen(url) as page:
        assert b"gradio-app" in page.read()


@pytest.mark.ray
@pytest.mark.parametrize(
    "command", [line for line in commands() if line.startswith(".venv/bin/llava") and not is_page(line)]
)
def test_the_readmes_commands_run(service_url: str, command: str, tmp_path: Path) -> None:
    arguments = shlex.split(command.replace("http://127.0.0.1:8000", service_url))[1:]
    if "evaluate" in arguments:
        arguments += ["--questions", "18"]
    if "keys" in arguments:
        arguments += ["--keys-file", str(tmp_path / "keys.json")]
    if "batch" in arguments:
        # A job needs its own Ray, which tests/cluster/batch/test_cli.py starts.
        arguments = ["batch", "--help"]
    if "build" in arguments:
        arguments = [*arguments[:-1], str(tmp_path / "out"), "--help"]
    printed = subprocess.run([str(LLAVA), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip()


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_the_readmes_make_targets_exist(command: str) -> None:
    target = shlex.split(command)[1]
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert planned.returncode == 0, planned.stderr
