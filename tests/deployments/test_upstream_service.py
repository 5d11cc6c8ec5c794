"""A running service without its own model in front of a second service of ours: answers, pictures, hang-ups, and the
death of the second one in the middle of an answer."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.commands.top import Change, Page, screen
from deployments.launch.processes import descendants
from deployments.metrics import RUNNING, UPSTREAM_REQUESTS, UPSTREAM_TOKENS, UPSTREAM_UP
from tests.deployments.pictures import data_url, plain
from tests.deployments.service import Running, content, events, long_checkpoint, messages, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
STAGE = {"num_cpus": 0.05}
COMPUTE = {**STAGE, "dtype": "float32", "device": "cpu", "threads": 1}
# So that only a key that was sent grants access.
KEY = "sk-of-the-front-service-alone"


@pytest.fixture(scope="module")
def behind(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("behind")
    stages = {"gateway": STAGE, "preprocessor": STAGE, "vision_encoder": COMPUTE, "generator": COMPUTE}
    with serving(long_checkpoint(tiny_checkpoint, folder), folder, is_killed=True, **stages) as running:
        yield running


@pytest.fixture(scope="module")
def front(behind: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The front service, without any model of its own."""
    folder = tmp_path_factory.mktemp("front")
    upstream = {"url": f"{behind.url}/v1", "model": behind.model, "api_key_env": "BIG_KEY", "check_seconds": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIG_KEY", KEY)
        with serving(
            folder / "big", folder, models=[{"name": "big", "upstream": upstream}], gateway=STAGE, preprocessor=STAGE
        ) as running:
            yield running


def _chat(service: Running, model: str, parts: Any, **more: Any) -> Any:
    return service.client.chat.completions.create(model=model, messages=messages(parts), max_tokens=12, **more)


def test_it_gives_the_same_answers_as_the_service_behind_it(front: Running, behind: Running) -> None:
    for parts in ("What?", content(plain("green"), "What?")):
        there, here = _chat(behind, behind.model, parts), _chat(front, "big", parts)
        assert here.choices == there.choices
        # On the second request, most of the prompt is cached.
        assert (here.model, here.usage.total_tokens) == ("big", there.usage.total_tokens)
        streamed = _chat(front, "big", parts, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == there.choices[0].message.content
    complete = {"prompt": "Once", "max_tokens": 12, "logprobs": 2}
    there, here = (
        service.client.completions.create(model=model, **complete)
        for service, model in ((behind, behind.model), (front, "big"))
    )
    assert here.choices == there.choices


def test_no_tower_and_no_generator_is_started_for_it(front: Running) -> None:
    assert [model.id for model in front.client.models.list()] == ["big"]
    replicas = [len(front.replicas(stage)) for stage in ("Gateway", "Preprocessor", "VisionEncoder", "Generator")]
    assert replicas == [1, 1, 0, 0]
    until(lambda: httpx.get(f"{front.url}/health").json()["upstreams"] == {"big": "ok"})
    assert httpx.get(f"{front.url}/health").json()["stages"] == {"preprocessor": "ok"}


def test_a_picture_url_is_refused_here_and_not_left_to_the_upstream(front: Running) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]
    response = front.post(model="big", messages=messages(parts))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "image_url_not_allowed")
    damaged = [{"type": "image_url", "image_url": {"url": data_url(plain()[:60])}}]
    response = front.post(model="big", messages=messages(damaged))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_image")
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url"


def test_forwarded_requests_are_counted_and_shown(front: Running) -> None:
    _chat(front, "big", "What?")

    def check(page: Page) -> None:
        assert page.total(UPSTREAM_REQUESTS, model="big", outcome="answered") > 0
        assert page.total(UPSTREAM_TOKENS, model="big", kind="completion") > 0
        assert page.total(UPSTREAM_UP, model="big") == 1
        assert any(line.split()[:2] == ["big", "up"] for line in screen(Change(page, page)))

    front.settled_metrics(check)


def test_a_client_disconnect_frees_the_service_behind(front: Running, behind: Running) -> None:
    body = {"model": "big", "messages": messages("Go on."), "max_tokens": 7000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body, timeout=60) as response:
        stream = events(response)
        next(stream)
        until(lambda: behind.metrics().total(RUNNING) == 1)
    until(lambda: behind.metrics().total(RUNNING) == 0)


def test_the_death_of_the_upstream_during_an_answer_is_reported(front: Running, behind: Running) -> None:
    """The last test of this file, because it leaves no second service."""
    body = {"model": "big", "messages": messages("Go on."), "max_tokens": 4000, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body, timeout=60) as response:
        stream = events(response)
        assert next(stream)["model"] == "big"
        for pid in (behind.pid, *(process.pid for process in descendants(behind.pid))):
            os.kill(pid, signal.SIGKILL)
        *_, last = stream
    assert set(last) == {"error", "request_id"}
    assert last["error"]["code"] == "upstream_cut"
    assert (
        last["error"]["message"] == "the server behind model 'big' broke the connection before the answer was complete"
    )
    # The front service keeps running, and reports what is wrong.
    response = front.post(model="big", messages=messages("What?"))
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unreachable")
    with pytest.raises(openai.InternalServerError, match="cannot be reached"):
        _chat(front, "big", "What?", stream=True)
    until(lambda: httpx.get(f"{front.url}/health").json()["upstreams"] == {"big": "unreachable"})
    assert httpx.get(f"{front.url}/health").status_code == 200
    until(lambda: front.metrics().total(UPSTREAM_UP, model="big") == 0)
    log = front.log_text()
    assert "model big: its server" in log
    assert KEY not in log
