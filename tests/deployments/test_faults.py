"""Replicas that are killed: clients are told, health says so, and the service recovers. A real Ray."""

import concurrent.futures
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deployments.pictures import plain
from tests.deployments.service import Running, content, events, long_checkpoint, messages, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ENDLESS = {"max_tokens": 7_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("faults")
    compute = {"num_cpus": 0.05, "dtype": "float32", "threads": 1}
    with serving(
        long_checkpoint(tiny_checkpoint, folder), folder, vision_encoder=compute, generator=compute
    ) as running:
        yield running


def _health(service: Running) -> int:
    return httpx.get(f"{service.url}/health", timeout=10).status_code


def _kill(service: Running, stage: str) -> None:
    pids = service.replicas(stage)
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _assert_recovers(service: Running) -> None:
    """Health notices the loss, and once it has forgotten it the service answers."""
    until(lambda: _health(service) == 503)
    until(lambda: _health(service) == 200, deadline_s=120)
    assert service.post(messages=messages(content(plain(), "What?")), max_tokens=3).status_code == 200


def _assert_is_loss(body: Any) -> None:
    assert set(body) == {"error", "request_id"}
    assert (body["error"]["type"], body["error"]["code"]) == ("server_error", "replica_lost")


def test_a_generator_that_is_killed_ends_its_stream_with_an_error(service: Running) -> None:
    body = {"messages": messages(content(plain(), "What?")), "stream": True, **ENDLESS}
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=60) as response:
        seen = events(response)
        for _ in range(3):
            assert "choices" in next(seen)
        _kill(service, "Generator")
        *_, last = seen
    _assert_is_loss(last)
    _assert_recovers(service)


def test_a_generator_that_is_killed_fails_an_answer_in_one_piece(service: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        answer = client.submit(service.post, messages=messages("hi"), **ENDLESS)
        # An answer in one piece says nothing before it ends, but writing it is work, and idle replicas do none.
        (pid,) = service.replicas("Generator")
        begun = _cpu_seconds(pid)
        until(lambda: _cpu_seconds(pid) > begun + 1.0, deadline_s=60)
        assert not answer.done()
        _kill(service, "Generator")
        response = answer.result(60)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    _assert_is_loss(response.json())
    _assert_recovers(service)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_time_is_up_is_told_in_our_words_and_frees_the_generator(
    service: Running, *, stream: bool
) -> None:
    """Serve reads the same header, and would answer in plain text."""
    body = {"messages": messages("hi"), "stream": stream, **ENDLESS}
    headers = {"x-request-timeout-seconds": "2"}
    response = httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == (200 if stream else 504)
    last = list(events(response))[-1] if stream else response.json()
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "deadline_exceeded")
    [pid] = service.replicas("Generator")

    def is_idle() -> bool:
        before = _cpu_seconds(pid)
        time.sleep(0.5)
        return _cpu_seconds(pid) - before < 0.1

    until(is_idle)


def _slow_pictures(green: int) -> list[Any]:
    """Of a few kilobytes each, and seconds of work for the preprocessor, which has not seen them before."""
    pictures = [plain((red, green, 0), (6000, 6000)) for red in range(6)]
    return [part for picture in pictures for part in content(picture, "What?")]


def _kill_at_work(service: Running) -> None:
    """The preprocessor, once it can serve and computes, which without a request it does not."""
    until(lambda: _health(service) == 200, deadline_s=120)
    [pid] = service.replicas("Preprocessor")
    begun = _cpu_seconds(pid)
    until(lambda: _cpu_seconds(pid) > begun + 0.5, deadline_s=60)
    os.kill(pid, signal.SIGKILL)
    until(lambda: _health(service) == 503)


def test_what_was_on_a_replica_that_is_killed_is_answered_by_the_next(service: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        body = {"messages": messages(_slow_pictures(1)), "max_tokens": 3}
        answers = [clients.submit(service.post, **body, stream=stream) for stream in (False, True)]
        _kill_at_work(service)
        assert [answer.result(120).status_code for answer in answers] == [200, 200]


def test_pictures_that_kill_twice_are_refused_and_others_are_not(service: Running) -> None:
    content_of_all = [*_slow_pictures(2), *content(plain("olive"), "?")]
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        killing = clients.submit(service.post, messages=messages(content_of_all), max_tokens=3)
        _kill_at_work(service)
        _kill_at_work(service)
        refused = killing.result(120)
    again = messages(content(plain("olive"), "Something else?"))
    for response in (refused, service.post(messages=again, max_tokens=3), service.post(messages=again, stream=True)):
        assert response.status_code == 422, response.text
        assert response.json()["error"]["code"] == "content_refused"
    until(lambda: _health(service) == 200, deadline_s=120)
    assert service.post(messages=messages(content(plain(), "What?")), max_tokens=3).status_code == 200
    assert service.post(messages=messages("What?"), max_tokens=3).status_code == 200


def test_an_encoder_that_is_killed_leaves_nobody_waiting(service: Running) -> None:
    [pid] = service.replicas("VisionEncoder")
    # So that the request is with it, or on its way to it, when it is killed.
    os.kill(pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        ask = {"messages": messages(content(plain(), "What?")), "max_tokens": 3}
        answers = [clients.submit(service.post, **ask, stream=stream) for stream in (False, True)]
        # Text goes past the encoder, whatever state that is in.
        assert service.post(messages=messages("hi"), max_tokens=1).status_code == 200
        os.kill(pid, signal.SIGKILL)
        for answer in answers:
            # Whether or not it had been handed to the replica.
            assert answer.result(120).status_code == 200
    until(lambda: _health(service) == 200, deadline_s=120)
    assert service.post(**ask).status_code == 200
