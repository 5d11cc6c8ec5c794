"""The service as users run it: `llava serve` and `llava demo`, a real local Ray, real HTTP, two replicas per stage."""

import concurrent.futures
import contextlib
import json
import os
import re
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
import pytest
import yaml
from PIL import Image

from deployments.processes import Process, descendants, end
from llava_core.checkpoints.load import LoadOptions
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import data_url, encode, plain, unusable
from tests.tiny import IMAGE_TOKENS, edit_json

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROGRAM = "import sys; from deployments.cli import {0}; {0}(sys.argv[1:])"
START_S = 180.0


def _until(condition: Callable[[], bool], *, deadline_s: float = 30.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "it has not come to pass in time"
        time.sleep(0.02)


def _free_port() -> int:
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

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def log_text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs.rglob("*.log"))


@contextlib.contextmanager
def _ray_files() -> Iterator[Path]:
    """Where Ray puts sockets and logs; a short path, because sockets' are limited to 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _started(command: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A command of ours in a terminal's place, and where its Ray keeps files; whatever it began ends with the block."""
    with _ray_files() as files:
        environment = {**os.environ, "RAY_TMPDIR": str(files), "PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(command), *arguments],
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


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does: to every process of the terminal. The command must end well, and nothing may be left of it."""
    begun = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert not _alive(begun)


def _alive(processes: set[Process]) -> set[Process]:
    """Those that have not ended, whoever has inherited them."""
    return processes & descendants(1)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a context that is long enough for answers that do not end while a test looks at them."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("long") / "long-llava"))
    edit_json(copy / "config.json", lambda config: config["text_config"].update(max_position_embeddings=8192))
    return copy


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stage = {"num_cpus": 0.05, "min_replicas": 2, "max_replicas": 2}
    compute = {**stage, "dtype": "float32", "device": "cpu", "threads": 1}
    args = {
        "model": str(checkpoint),
        "limits": {"max_image_pixels": 4_000_000},
        "engine": {"max_running": 1, "max_waiting": 8},
        "gateway": {**stage, "max_ongoing_requests": 100},
        "preprocessor": stage,
        "vision_encoder": compute,
        "generator": {**compute, "max_ongoing_requests": 50},
    }
    application = {"name": "llava", "route_prefix": "/", "import_path": "deployments.app:build_app", "args": args}
    config = tmp_path_factory.mktemp("service") / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [application]}))
    port = _free_port()
    with _started("serve", "--config", str(config), "--port", str(port)) as (process, files):
        assert "HTTP" in _read_until(process, "/health")
        url = f"http://127.0.0.1:{port}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield Running(url, checkpoint.name, files / "ray", client)
        _interrupt(process)


def _read_until(process: subprocess.Popen[bytes], mark: str) -> str:
    """What a starting service prints up to a line with this mark. Fails when it ends, or stays silent for too long."""
    assert process.stdout is not None
    lines: list[str] = []
    while mark not in (lines[-1] if lines else ""):
        readable, _, _ = select.select([process.stdout], [], [], START_S)
        assert readable, f"the service has stopped saying anything: {''.join(lines)}"
        lines.append(process.stdout.readline().decode())
        assert lines[-1], f"the service ended: {''.join(lines)}"
    return "".join(lines)


@pytest.fixture(scope="module")
def in_process(checkpoint: Path) -> LocalModel:
    return LocalModel(checkpoint, options=LoadOptions(dtype="float32"))


def _expected(model: LocalModel, *parts: TextPart | ImagePart, max_tokens: int = 12) -> str:
    request = GenerationRequest("expected", (Message("user", parts),), SamplingParams(max_tokens=max_tokens))
    return "".join(delta.text for delta in model.stream(request))


def _content(picture: bytes, text: str) -> list[Any]:
    return [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": text}]


def _messages(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def test_two_replicas_of_every_stage_are_up(service: Running) -> None:
    health = httpx.get(f"{service.url}/health", timeout=10)
    assert health.status_code == 200
    assert set(health.json()["stages"]) == {"preprocessor", "vision_encoder", "generator"}
    for stage in ("Gateway", "Preprocessor", "VisionEncoder", "Generator"):
        assert len(list(service.logs.rglob(f"session_2*/logs/serve/replica_llava_{stage}_*.log"))) == 2


def test_openais_client_lists_the_model(service: Running) -> None:
    assert [model.id for model in service.client.models.list()] == [service.model]
    assert service.client.models.retrieve(service.model).owned_by == "llava-serve"


def test_openais_client_gets_an_answer_in_one_piece(service: Running, in_process: LocalModel) -> None:
    completion = service.client.chat.completions.create(
        model=service.model, messages=_messages(_content(plain(), "What?")), max_tokens=12
    )
    assert completion.choices[0].message.content == _expected(in_process, ImagePart(plain()), TextPart("What?"))
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    assert details is not None
    assert details.model_dump()["image_tokens"] == IMAGE_TOKENS
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_openais_client_streams(service: Running, in_process: LocalModel) -> None:
    stream = service.client.chat.completions.create(
        model=service.model,
        messages=_messages(_content(plain("blue"), "What?")),
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == _expected(in_process, ImagePart(plain("blue")), TextPart("What?"))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 12


def test_openais_client_gets_its_own_exceptions(service: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        service.client.chat.completions.create(model="gpt-9", messages=_messages("hi"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="max_tokens") as bad:
        service.client.chat.completions.create(model=service.model, messages=_messages("hi"), max_tokens=100_000)
    assert bad.value.code == "context_length_exceeded"
    assert bad.value.request_id


def test_eight_clients_at_once_get_their_own_answers(service: Running, in_process: LocalModel) -> None:
    colours = [(37 * index % 256, 91 * index % 256, 53 * index % 256) for index in range(8)]
    expected = [_expected(in_process, ImagePart(plain(c)), TextPart(f"Q{i}")) for i, c in enumerate(colours)]
    assert len(set(expected)) > 1

    def ask(index: int) -> str:
        answer = service.post(messages=_messages(_content(plain(colours[index]), f"Q{index}")), max_tokens=12)
        return str(answer.json()["choices"][0]["message"]["content"])

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(8))) == expected


def test_a_picture_larger_than_serves_inline_limit_is_served(service: Running, in_process: LocalModel) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((1500, 1500), 200)] * 3)
    picture = encode(noise, "BMP")
    assert len(picture) > 4 * 1024 * 1024
    answer = service.post(messages=_messages(_content(picture, "What?")), max_tokens=12)
    assert answer.json()["choices"][0]["message"]["content"] == _expected(
        in_process, ImagePart(picture), TextPart("What?")
    )


def test_every_answer_has_one_request_id_and_the_time_of_each_stage(service: Running) -> None:
    answer = service.post(messages=_messages(_content(plain(), "What?")), max_tokens=3, timings=True)
    assert re.fullmatch(r"[0-9a-f-]{32,36}", answer.headers["x-request-id"])
    assert set(answer.json()["timings"]) == {
        "preprocess", "encode", "transfer", "queue", "prefill", "decode", "total",
    }  # fmt: skip


def _status(service: Running) -> int | None:
    """Of a short request; None if it is not answered soon, because it waits behind others."""
    body = {"messages": _messages("hi"), "max_tokens": 1}
    try:
        response = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=3)
    except httpx.ReadTimeout:
        return None
    assert response.status_code != 429 or int(response.headers["retry-after"]) >= 1
    return response.status_code


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_service_says_so_and_clients_that_hang_up_make_room(service: Running, *, stream: bool) -> None:
    """Each replica writes one answer and lets eight wait. These would take minutes, so only hanging up frees them."""
    body = {
        "messages": _messages(_content(plain(), "What?")),
        "max_tokens": 7_000,
        "ignore_eos": True,
        "stream": stream,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode()
    host, port = service.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as clients:

        def fill_up() -> bool:
            for _ in range(6):
                client = clients.enter_context(socket.create_connection((host, int(port)), timeout=10))
                client.sendall(head + content)
            # Each goes to the replica that has less to do, so both of them refuse.
            return {_status(service) for _ in range(3)} == {429}

        _until(fill_up)
    _until(lambda: _status(service) == 200, deadline_s=20)


def test_clients_mistakes_are_4xx_in_openais_shape_and_leave_no_traceback(service: Running) -> None:
    pictures = [{"messages": _messages(_content(data, "What?"))} for data in unusable().values() if data[:4] != b"\xff"]
    pictures.pop(list(unusable()).index("too many pixels"))
    others: list[dict[str, Any]] = [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": _messages(5)},
        {"messages": _messages("x " * 9_000)},
        {"messages": _messages("a </s> b")},
        {"messages": _messages("hi"), "max_tokens": 0},
        {"messages": _messages("hi"), "max_tokens": 100_000},
        {"messages": _messages("hi"), "temperature": "hot"},
        {"messages": _messages("hi"), "model": "gpt-9"},
        {"messages": _messages("hi"), "tools": [{"type": "function"}]},
        {"messages": _messages([{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}])},
        {"messages": _messages(_content(plain(), "What?") * 9)},
    ]
    for body in [*pictures, *others]:
        for stream in (False, True):
            _assert_refused(service.post(**body, stream=stream))
    _assert_refused(httpx.post(f"{service.url}/v1/chat/completions", content=b"{", timeout=60))
    _assert_refused(httpx.get(f"{service.url}/nothing", timeout=60))
    _assert_refused(httpx.get(f"{service.url}/v1/chat/completions", timeout=60))
    # An error that Serve logs is written at once, whatever else is buffered.
    assert service.post(messages=_messages("hi"), max_tokens=2).status_code == 200
    assert "Traceback" not in service.log_text()


def _assert_refused(response: httpx.Response) -> None:
    assert 400 <= response.status_code < 500, response.text
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["request_id"] == response.headers["x-request-id"]


def test_too_large_a_body_is_refused(service: Running) -> None:
    response = httpx.post(f"{service.url}/v1/chat/completions", content=b" " * (65 * 1024 * 1024), timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_the_demo_answers_and_leaves_nothing_behind(tiny_checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(plain())
    port = str(_free_port())
    options = ["--model", str(tiny_checkpoint), "--port", port, "--image", str(picture), "--question", "What is it?"]
    with _started("demo", *options) as (process, _):
        printed = _read_until(process, "HTTP")
        begun = descendants(process.pid)
        printed += process.communicate(timeout=START_S)[0].decode()
    assert process.returncode == 0, printed
    assert "picture.png: What is it?" in printed
    assert all(stage in printed for stage in ("preprocess", "encode", "prefill", "decode", "total"))
    assert f"curl -sN http://127.0.0.1:{port}/v1/chat/completions" in printed
    assert not _alive(begun)


def test_a_checkpoint_that_does_not_fit_its_config_ends_the_start(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["vision_config"].update(intermediate_size=48))
    with _started("serve", "--model", str(checkpoint_copy), "--port", str(_free_port())) as (process, _):
        printed = process.communicate(timeout=START_S)[0].decode()
    assert process.returncode == 1
    *_, error = printed.strip().splitlines()
    assert error.startswith(f"Error: VisionEncoder: {checkpoint_copy}: tower tensor")
    assert "Traceback" not in printed
