"""The service as users run it: `llava serve` and `llava demo`, a real local Ray, real HTTP, two gateways and two
generators; test_routing_service.py has two replicas of the other stages."""

import asyncio
import concurrent.futures
import contextlib
import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from benchmarks.ports import free_port
from deployments.launch.processes import descendants
from llava_core.checkpoints.load import LoadOptions
from llava_core.inference import LocalModel
from llava_core.scenes.draw import draw_scene
from llava_core.scenes.scene import sample_scene
from llava_core.types import CompletionRequest, GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import data_url, encode, plain, unusable
from tests.deployments.service import (
    START_S,
    Running,
    alive,
    content,
    llava,
    messages,
    read_until,
    serving,
    started,
    until,
    write_config,
)
from tests.dicom_files import PLANTED, data_set, dicom, written
from tests.tiny import IMAGE_TOKENS, edit_json

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(long_context: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stage = {"num_cpus": 0.05}
    compute = {**stage, "dtype": "float32", "device": "auto", "threads": 1}
    two = {"min_replicas": 2, "max_replicas": 2}
    with serving(
        long_context,
        tmp_path_factory.mktemp("service"),
        route_prefix="/vision",
        limits={"max_image_pixels": 4_000_000},
        engine={"max_running": 1, "max_waiting": 8},
        gateway={**stage, **two, "max_ongoing_requests": 100},
        preprocessor=stage,
        vision_encoder=compute,
        generator={**compute, **two, "max_ongoing_requests": 50},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def in_process(long_context: Path) -> LocalModel:
    return LocalModel(long_context, options=LoadOptions(dtype="float32"))


def _expected(model: LocalModel, *parts: TextPart | ImagePart, max_tokens: int = 12) -> str:
    request = GenerationRequest("expected", (Message("user", parts),), SamplingParams(max_tokens=max_tokens))
    return "".join(delta.text for delta in model.stream(request))


def test_every_stage_is_ready_with_its_replicas(service: Running) -> None:
    health = httpx.get(f"{service.url}/health", timeout=10)
    assert health.status_code == 200
    assert set(health.json()["stages"]) == {"preprocessor", "vision_encoder", "generator"}
    for stage, num_replicas in (("Gateway", 2), ("Preprocessor", 1), ("VisionEncoder", 1), ("Generator", 2)):
        assert len(list(service.logs.rglob(f"session_2*/logs/serve/replica_llava_{stage}_*.log"))) == num_replicas


def test_every_process_calls_the_others_with_a_token(service: Running) -> None:
    pids = [pid for stage in ("Gateway", "Generator") for pid in service.replicas(stage)]
    assert len(pids) == 4
    for pid in pids:
        assert b"RAY_AUTH_MODE=token" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def test_the_openai_client_lists_the_model(service: Running) -> None:
    assert [model.id for model in service.client.models.list()] == [service.model]
    assert service.client.models.retrieve(service.model).owned_by == "llava-serve"


def test_the_openai_client_gets_an_unstreamed_answer(service: Running, in_process: LocalModel) -> None:
    completion = service.client.chat.completions.create(
        model=service.model, messages=messages(content(plain(), "What?")), max_tokens=12
    )
    assert completion.choices[0].message.content == _expected(in_process, ImagePart(plain()), TextPart("What?"))
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    assert details is not None
    assert details.model_dump()["image_tokens"] == IMAGE_TOKENS
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_the_openai_client_streams(service: Running, in_process: LocalModel) -> None:
    stream = service.client.chat.completions.create(
        model=service.model,
        messages=messages(content(plain("blue"), "What?")),
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


def test_the_openai_client_streams_several_answers_with_log_probabilities(
    service: Running, in_process: LocalModel
) -> None:
    stream = service.client.chat.completions.create(
        model=service.model,
        messages=messages(content(plain("green"), "What?")),
        max_tokens=12,
        n=2,
        logprobs=True,
        top_logprobs=2,
        stream=True,
    )
    texts, spelled = ["", ""], [b"", b""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            for each in (choice.logprobs.content or ()) if choice.logprobs else ():
                spelled[choice.index] += bytes(each.bytes or ())
    # Greedy, so both answers are the same.
    assert texts == [_expected(in_process, ImagePart(plain("green")), TextPart("What?"))] * 2
    assert spelled[0] == spelled[1] != b""


def test_a_text_is_continued_and_its_tokens_are_counted(service: Running, in_process: LocalModel) -> None:
    request = CompletionRequest("expected", "Once upon", SamplingParams(max_tokens=16))
    expected = "".join(delta.text for delta in in_process.stream(request))
    completion = service.client.completions.create(model=service.model, prompt="Once upon")
    assert completion.choices[0].text == expected
    assert completion.usage is not None
    counted = httpx.post(f"{service.url}/tokenize", json={"prompt": "Once upon"}, timeout=60).json()
    assert (counted["count"], counted["max_model_len"]) == (completion.usage.prompt_tokens, 8192)
    text = httpx.post(f"{service.url}/detokenize", json={"tokens": counted["tokens"]}, timeout=60)
    assert text.json() == {"prompt": "<s>Once upon"}
    question = {"messages": messages(content(plain(), "What?"))}
    assert httpx.post(f"{service.url}/tokenize", json=question, timeout=60).json()["count"] > IMAGE_TOKENS


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_each_continued(service: Running, *, stream: bool) -> None:
    prompts = ["Once upon", "What", "Once upon", "The end"]
    alone = {prompt: _continued(service, [prompt], n=1, stream=False)[0] for prompt in prompts}
    texts = _continued(service, prompts, n=2, stream=stream)
    assert texts == [alone[prompt] for prompt in prompts for _ in range(2)]


def _continued(service: Running, prompts: list[str], *, n: int, stream: bool) -> list[str]:
    """Return the texts by index."""
    texts = [""] * (len(prompts) * n)
    given: Any = {"model": service.model, "prompt": prompts, "max_tokens": 8, "n": n}
    if not stream:
        for choice in service.client.completions.create(**given, timeout=60).choices:
            texts[choice.index] = choice.text
        return texts
    for chunk in service.client.completions.create(**given, stream=True, timeout=60):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    return texts


def test_the_openai_client_gets_its_own_exceptions(service: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        service.client.chat.completions.create(model="gpt-9", messages=messages("hi"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="max_tokens") as bad:
        service.client.chat.completions.create(model=service.model, messages=messages("hi"), max_tokens=100_000)
    assert bad.value.code == "context_length_exceeded"
    assert bad.value.request_id


def test_eight_concurrent_clients_get_their_own_answers(service: Running, in_process: LocalModel) -> None:
    colours = [(37 * index % 256, 91 * index % 256, 53 * index % 256) for index in range(8)]
    expected = [_expected(in_process, ImagePart(plain(c)), TextPart(f"Q{i}")) for i, c in enumerate(colours)]
    assert len(set(expected)) > 1

    def ask(index: int) -> str:
        answer = service.post(messages=messages(content(plain(colours[index]), f"Q{index}")), max_tokens=12)
        return str(answer.json()["choices"][0]["message"]["content"])

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, range(8))) == expected


def test_a_picture_larger_than_serves_inline_limit_is_served(service: Running, in_process: LocalModel) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((1500, 1500), 200)] * 3)
    picture = encode(noise, "BMP")
    assert len(picture) > 4 * 1024 * 1024
    answer = service.post(messages=messages(content(picture, "What?")), max_tokens=12)
    assert answer.json()["choices"][0]["message"]["content"] == _expected(
        in_process, ImagePart(picture), TextPart("What?")
    )


def test_a_radiograph_is_answered_without_revealing_its_patient(service: Running, in_process: LocalModel) -> None:
    """A scene as stored by a 12-bit detector; then damaged files, and one that is a report."""
    grey = draw_scene(sample_scene(random.Random(3))).convert("L")
    stored = 4095 - np.rint(np.asarray(grey) * (4095 / 255)).astype(np.uint16)
    data = dicom(stored, bits=12, photometric="MONOCHROME1", WindowCenter=[5, 2048], WindowWidth=[9, 4096])

    def asked(sent: bytes, **view: Any) -> httpx.Response:
        picture = {"url": data_url(sent, "application/dicom"), "dicom": view}
        parts = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "What?"}]
        return service.post(messages=messages(parts), max_tokens=12, image_transforms=True)

    answer = asked(data, window=2)
    expected = _expected(in_process, ImagePart(encode(grey)), TextPart("What?"))
    assert answer.json()["choices"][0]["message"]["content"] == expected
    [transform] = answer.json()["image_transforms"]
    assert (transform["photometric"], transform["is_inverted"], transform["bits"]) == ("MONOCHROME1", True, 12)
    assert (transform["window"]["centre"], transform["window"]["source"]) == (2048, "file")

    report = data_set(stored, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    del report.PixelData
    refused = [asked(data, frame=2), asked(data, window=3), asked(data[: len(data) // 2]), asked(written(report))]
    for response, named in zip(refused, ("no frame 2", "no window 3", "cut short", "structured report"), strict=True):
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_image", "messages[0].content[0].image_url")
        assert named in error["message"]
    seen = [answer.text, *(response.text for response in refused), service.log_text()]
    seen.append(httpx.get(service.metrics_url, timeout=10, trust_env=False).text)
    seen += [path.read_text(errors="replace") for path in service.logs.rglob("*.err")]
    assert PLANTED.lower() not in "".join(seen).lower()


def test_every_answer_has_one_request_id_and_the_time_of_each_stage(service: Running) -> None:
    answer = service.post(messages=messages(content(plain(), "What?")), max_tokens=3, timings=True)
    assert re.fullmatch(r"[0-9a-f-]{32,36}", answer.headers["x-request-id"])
    assert set(answer.json()["timings"]) == {
        "preprocess", "encode", "transfer", "queue", "prefill", "decode", "total",
    }  # fmt: skip


def _status(service: Running) -> int | None:
    """Return the status of a short request; None if it is not answered soon, because it waits behind others."""
    body = {"messages": messages("hi"), "max_tokens": 1}
    try:
        response = httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=10)
    except httpx.TimeoutException:
        return None
    assert response.status_code != 429 or int(response.headers["retry-after"]) >= 1
    return response.status_code


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_service_refuses_and_disconnecting_clients_make_room(service: Running, *, stream: bool) -> None:
    """Each replica runs one request and queues eight. They would take minutes, so only hanging up frees the slots."""
    body = {
        "messages": messages(content(plain(), "What?")),
        "max_tokens": 7_000,
        "ignore_eos": True,
        "stream": stream,
    }
    sent = json.dumps(body).encode()
    url = httpx.URL(f"{service.url}/v1/chat/completions")
    head = f"POST {url.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(sent)}\r\n\r\n".encode()
    with contextlib.ExitStack() as clients:

        def fill_up() -> bool:
            # As many as both replicas take, so that the first check already finds them full.
            for _ in range(18):
                client = clients.enter_context(socket.create_connection((url.host, url.port), timeout=10))
                client.sendall(head + sent)
            # These go to the replica that has seen the picture, or if that is full to the other; so both refuse.
            return all(_status(service) == 429 for _ in range(3))

        until(fill_up, deadline_s=200)
        # A full service is healthy, and health checks do not queue behind its requests.
        assert httpx.get(f"{service.url}/health", timeout=30).status_code == 200
    until(lambda: _status(service) == 200)


def test_client_errors_are_4xx_in_openais_shape_without_a_traceback(service: Running) -> None:
    pictures = [{"messages": messages(content(data, "What?"))} for data in unusable().values() if data[:4] != b"\xff"]
    pictures.pop(list(unusable()).index("too many pixels"))
    others: list[dict[str, Any]] = [
        {},
        {"messages": []},
        {"messages": "hi"},
        {"messages": messages(5)},
        {"messages": messages("x " * 9_000)},
        {"messages": messages("hi"), "max_tokens": 0},
        {"messages": messages("hi"), "max_tokens": 100_000},
        {"messages": messages("hi"), "temperature": "hot"},
        {"messages": messages("hi"), "model": "gpt-9"},
        {"messages": messages("hi"), "tools": [{"type": "function"}]},
        {"messages": messages("hi"), "n": 17},
        {"messages": messages("hi"), "logit_bias": {"1000000": 1}},
        {"messages": messages([{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}])},
        {"messages": messages(content(plain(), "What?") * 9)},
    ]
    for body in [*pictures, *others]:
        for stream in (False, True):
            _assert_refused(service.post(**body, stream=stream))
    _assert_refused(httpx.post(f"{service.url}/v1/chat/completions", content=b"{", timeout=60))
    _assert_refused(httpx.get(f"{service.url}/nothing", timeout=60))
    _assert_refused(httpx.get(f"{service.url}/v1/chat/completions", timeout=60))
    assert service.post(messages=messages(content(plain(), "What?")), max_tokens=2, stream=True).status_code == 200
    # Serve writes errors to its log at once, even if it buffers other records.
    assert service.post(messages=messages("hi"), max_tokens=2).status_code == 200
    assert "Traceback" not in service.log_text()


def _assert_refused(response: httpx.Response) -> None:
    assert 400 <= response.status_code < 500, response.text
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["request_id"] == response.headers["x-request-id"]


def test_a_body_that_is_too_large_is_refused(service: Running) -> None:
    async def post() -> httpx.Response:
        # Unlike the synchronous client, it does not look for the answer when the connection breaks while it sends.
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(f"{service.url}/v1/chat/completions", content=b" " * (65 * 1024 * 1024))

    response = asyncio.run(post())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_the_demo_answers_and_leaves_no_process_behind(tmp_path: Path) -> None:
    """The demo uses the model that comes with this project, as no other is named."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(plain())
    port = str(free_port())
    options = ["--port", port, "--image", str(picture), "--question", "What is it?"]
    with started(llava("demo", *options)) as (process, _):
        printed = read_until(process, "HTTP")
        begun = descendants(process.pid)
        printed += process.communicate(timeout=START_S)[0].decode()
    assert process.returncode == 0, printed
    assert "picture.png: What is it?" in printed
    assert all(stage in printed for stage in ("preprocess", "encode", "prefill", "decode", "total"))
    assert f"curl -sN http://127.0.0.1:{port}/v1/chat/completions" in printed
    assert not alive(begun)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to load it on")
def test_a_replica_that_cannot_load_aborts_the_start_and_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = write_config(tiny_checkpoint, tmp_path, generator={"num_cpus": 0.05, "device": "cuda"})
    with started(llava("serve", "--config", str(file), "--port", str(free_port()))) as (process, _):
        printed = process.communicate(timeout=START_S)[0].decode()
    assert process.returncode == 1
    *_, error = printed.strip().splitlines()
    assert error.startswith("Error: Generator: ")
    assert "cuda" in error
    assert "Traceback" not in printed


def test_a_checkpoint_that_does_not_fit_its_config_aborts_the_start(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["vision_config"].update(intermediate_size=48))
    with started(llava("serve", "--model", str(checkpoint_copy), "--port", str(free_port()))) as (process, _):
        printed = process.communicate(timeout=START_S)[0].decode()
    assert process.returncode == 1
    *_, error = printed.strip().splitlines()
    assert error.startswith("Error: tower model.encoder.layers.0.mlp.fc1")
    assert "Traceback" not in printed
