"""The original clients and workers against a running service: `llava serve`, a real local Ray, two gateways, real HTTP
under a prefix."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.metrics import ERRORS, HTTP_REQUESTS, REGISTERED_WORKERS, RUNNING, WORKER_FAILURES
from llava_core.checkpoints.load import LoadOptions
from llava_core.inference import LocalModel
from llava_core.types import ImagePart, RenderedRequest, SamplingParams
from tests.deployments.llava_protocol.original_clients import (
    CHEERFUL_ERROR,
    SYSTEM,
    GradioPage,
    as_png,
    frames_of,
    medrax_benchmark,
    send_test_message,
)
from tests.deployments.llava_protocol.original_worker import OriginalWorker, original_worker
from tests.deployments.pictures import plain
from tests.deployments.service import Running, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def worker() -> Iterator[OriginalWorker]:
    with original_worker() as running:
        yield running


@pytest.fixture(scope="module")
def service(long_context: Path, worker: OriginalWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stage = {"num_cpus": 0.05}
    compute = {**stage, "dtype": "float32", "device": "cpu", "threads": 1}
    workers = {"allowed_hosts": [worker.url.removeprefix("http://")], "allowed_networks": ["127.0.0.0/8"]}
    with serving(
        long_context,
        tmp_path_factory.mktemp("service"),
        route_prefix="/vision",
        gateway={**stage, "min_replicas": 2, "max_replicas": 2},
        preprocessor=stage,
        vision_encoder=compute,
        generator=compute,
        llava_protocol={
            "workers": {**workers, "allow_http": True, "heart_beat_expiration_s": 2, "silence_s": 2},
        },
    ) as running:
        yield running


@pytest.fixture(scope="module")
def in_process(long_context: Path) -> LocalModel:
    return LocalModel(long_context, options=LoadOptions(dtype="float32"))


def _expected(model: LocalModel, prompt: str, *images: bytes, **sampling: Any) -> str:
    request = RenderedRequest("expected", prompt, tuple(map(ImagePart, images)), SamplingParams(**sampling))
    return "".join(delta.text for delta in model.stream(request))


@pytest.mark.parametrize(
    ("prompt", "stop"),
    [
        # The prompts that the page renders, depending on the model's name, and LLaVA-Med's.
        (f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", "</s>"),
        ("[INST] <image>\nWhat? [/INST]", "</s>"),
        (f"{SYSTEM}###Human: <image>\nWhat?###Assistant:", "###"),
    ],
)
def test_the_page_shows_the_models_answer_for_each_template(
    prompt: str, stop: str, service: Running, in_process: LocalModel
) -> None:
    page = GradioPage(service.url)
    assert page.load() == [service.model]
    assert page.address(service.model) == service.url
    image = as_png(plain("green"))
    shown = list(page.ask(service.model, prompt, [image], stop, temperature=0, max_new_tokens=24))
    said = _expected(in_process, prompt, base64.b64decode(image), max_tokens=24, stop=(stop,))
    assert shown[-1] == said.strip() + "▌"
    # No text is shorter than the one before.
    assert [len(each) for each in shown] == sorted(len(each) for each in shown)


def test_test_message_gets_a_complete_answer(service: Running) -> None:
    """Its stop is a space, which does not end an answer here."""
    said = send_test_message(service.url, service.model, "Tell me a story.", max_new_tokens=32)
    assert said
    assert send_test_message(service.url, service.model, "Hi", worker=service.url)
    assert send_test_message(service.url, "facebook/opt-350m", "Hi") is None


def test_medraxs_benchmark_gets_its_answer(service: Running) -> None:
    said, last = medrax_benchmark(service.url, service.model, "Which is right? A) one B) two", plain("blue"))
    assert last["error_code"] == 0
    assert said


def test_bad_requests_are_reported_at_once_with_their_cause(service: Running) -> None:
    page = GradioPage(service.url)
    began = time.monotonic()
    for images in ([], ["aGk="]):
        shown = list(page.ask(service.model, "USER: <image>\nWhat? ASSISTANT:", images, "</s>"))
        assert shown == [f"{CHEERFUL_ERROR} (error_code: 1)"]
    # The reference reports it after 15 s.
    assert time.monotonic() - began < 10
    body = {"model": service.model, "prompt": "USER: <image>", "images": ["aGk="]}
    [frame] = frames_of(requests.post(f"{service.url}/worker_generate_stream", json=body, timeout=60))
    assert (frame["error_code"], frame["error"]["code"]) == (1, "invalid_image")
    until(lambda: service.metrics().total(ERRORS, code="invalid_image") >= 2)
    too_long = "x" * 9000
    [frame] = frames_of(requests.post(f"{service.url}/worker_generate_stream", json={"prompt": too_long}, timeout=60))
    expected = f"{too_long}Exceeds max token length. Please start a new conversation, thanks."
    assert frame == {"text": expected, "error_code": 0}


def test_a_visitor_who_leaves_frees_the_slot(service: Running) -> None:
    body = {"model": service.model, "prompt": "hi", "max_new_tokens": 1024, "temperature": 0}
    # A request that does not end by itself meanwhile.
    with requests.post(f"{service.url}/worker_generate_stream", json=body, stream=True, timeout=60) as response:
        assert next(frames_of(response))["error_code"] == 0
    until(lambda: service.metrics().total(RUNNING) == 0)
    until(lambda: service.metrics().total(HTTP_REQUESTS, route="/worker_generate_stream", status="499") >= 1)


def test_a_worker_registered_with_one_gateway_is_known_to_all(service: Running, worker: OriginalWorker) -> None:
    page = GradioPage(service.url)
    worker.register(service.url)
    # Asked more often than there are gateways, each time on a new connection.
    for _ in range(8):
        assert worker.heart_beat(service.url)
        assert sorted(requests.post(f"{service.url}/list_models", timeout=60).json()["models"]) == [
            "llava-other",
            service.model,
        ]
        assert list(page.ask("llava-other", "USER: hi", [], "</s>"))[-1] == "Hello▌"
    until(lambda: service.metrics().total(REGISTERED_WORKERS) == 1)
    # The worker stops sending heartbeats.
    until(lambda: page.models() == [service.model])
    assert not worker.heart_beat(service.url)


def test_a_misbehaving_worker_harms_no_other_requests(service: Running, worker: OriginalWorker) -> None:
    page = GradioPage(service.url)
    good = worker.script
    scripts = {"garbage": [b"garbage\0"], "cut_off": [b'{"text": "US'], "silent": [None]}
    for kind, pieces in scripts.items():
        worker.script = lambda _, pieces=pieces: pieces
        worker.register(service.url, check_heart_beat=False)
        shown = list(page.ask("llava-other", "USER: hi", [], "</s>"))
        assert shown[-1] == f"{CHEERFUL_ERROR} (error_code: 3)"
        assert page.address("llava-other") == ""
        assert list(page.ask(service.model, "USER: hi", [], "</s>", max_new_tokens=4))
        until(lambda kind=kind: service.metrics().total(WORKER_FAILURES, kind=kind) == 1)
    worker.script = good
    refused = requests.post(
        f"{service.url}/register_worker",
        json={"worker_name": "http://169.254.169.254", "check_heart_beat": False},
        timeout=60,
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
