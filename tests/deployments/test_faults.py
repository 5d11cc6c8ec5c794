"""Replicas that are killed: clients are told, health says so, and the service recovers. A real Ray."""

import concurrent.futures
import os
import signal
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
            response = answer.result(60)
            # What had not been handed to the replica is answered by the next one.
            assert response.status_code in (200, 503), response.text
            if response.status_code == 503:
                _assert_is_loss(response.json())
    until(lambda: _health(service) == 200, deadline_s=120)
    assert service.post(**ask).status_code == 200
