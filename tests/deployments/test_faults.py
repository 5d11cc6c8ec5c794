"""Processes killed under load: answers continue, health reports it, the service recovers. A real Ray."""

import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deployments.graph.signs_of_life import SILENCE_S
from deployments.metrics import RETRIES
from llava_core.client import Client
from tests.deployments.pictures import plain
from tests.deployments.service import (
    Running,
    comes_true,
    content,
    events,
    long_checkpoint,
    messages,
    read_until,
    serving,
    until,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ENDLESS = {"max_tokens": 7_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("faults")
    compute = {"num_cpus": 0.05, "dtype": "float32", "threads": 1}
    several = {**compute, "min_replicas": 2, "max_replicas": 2}
    with serving(
        long_checkpoint(tiny_checkpoint, folder), folder, vision_encoder=compute, generator=several
    ) as running:
        yield running


def _health(service: Running) -> int:
    return httpx.get(f"{service.url}/health", timeout=10).status_code


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _busiest_generator(service: Running, *, seconds: float = 0.05) -> int:
    """Return the pid of the generator that has computed most, once one has for so long. Generators without an answer do
    not compute, and the routers decide which have one."""
    begun = {pid: _cpu_seconds(pid) for pid in service.replicas("Generator")}
    until(lambda: any(_cpu_seconds(pid) > begun[pid] + seconds for pid in begun), deadline_s=60)
    return max(begun, key=lambda pid: _cpu_seconds(pid) - begun[pid])


def _await_all_replicas(service: Running) -> None:
    """Wait until every stage has its replicas, and no caller still relies on a dead one."""

    def is_complete() -> bool:
        return _health(service) == 200 and len(service.replicas("Generator")) == 2

    until(is_complete, deadline_s=120)
    assert service.post(messages=messages(content(plain(), "What?")), max_tokens=3).status_code == 200


def _retries(service: Running, phase: str) -> float:
    return service.metrics().total(RETRIES, stage="generator", phase=phase)


LONG = {"max_tokens": 1500, "ignore_eos": True}
ASKED: list[dict[str, Any]] = [
    {"messages": messages("hi"), **LONG},
    {"messages": messages("What else?"), "temperature": 1.0, "seed": 5, **LONG},
    {"messages": messages(content(plain("teal"), "What?")), "logprobs": True, "top_logprobs": 2, **LONG},
    {
        "messages": messages(content(plain("navy"), "?")),
        "temperature": 1.0,
        "seed": 6,
        "n": 2,
        "logprobs": True,
        **LONG,
    },
    {"messages": messages(content(plain("pink"), "Why?")), "temperature": 0.7, "seed": 7, "top_p": 0.9, **LONG},
    {"messages": messages("Who?"), "temperature": 1.0, "seed": 8, "frequency_penalty": 0.5, **LONG},
]


class _Stream:
    """Reads a stream in a thread, and knows its progress."""

    def __init__(self, service: Running, body: dict[str, Any]) -> None:
        self.num_events = 0
        self.error: Exception | None = None
        self.last: Any = None
        self.choices: dict[int, dict[str, Any]] = {}
        self._url = f"{service.url}/v1/chat/completions"
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def whole(self) -> dict[str, Any]:
        """Return the complete answer once it has arrived, with the log-probabilities' values separate: their last bits
        may differ."""
        self._thread.join(120)
        assert self.error is None, self.error
        assert self.last == "[DONE]", self.last
        return {"choices": self.choices, "usage": self._usage}

    def wait(self) -> None:
        self._thread.join(120)

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
                for self.last in events(response):
                    self._take(self.last)
                    self.num_events += 1
        except httpx.HTTPError as error:
            self.error = error

    def _take(self, event: Any) -> None:
        if event == "[DONE]" or "error" in event:
            return
        if event["usage"] is not None:
            self._usage = event["usage"]["completion_tokens"], event["usage"]["prompt_tokens"]
        for choice in event["choices"]:
            known = self.choices.setdefault(choice["index"], {"text": "", "tokens": [], "ends": []})
            known["text"] += choice["delta"].get("content") or ""
            given = (choice.get("logprobs") or {}).get("content") or []
            known["tokens"] += [(each["token"], [top["token"] for top in each["top_logprobs"]]) for each in given]
            known["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []


def _begun_streams(service: Running, **changes: Any) -> list[_Stream]:
    """Return a stream of each request, with these changes, once all have begun."""
    streams = [_Stream(service, {**body, **changes}) for body in ASKED]
    until(lambda: all(stream.num_events > 3 for stream in streams))
    return streams


@pytest.fixture(scope="module")
def expected(service: Running) -> list[dict[str, Any]]:
    """The results of these streams when undisturbed."""
    whole = [stream.whole() for stream in _begun_streams(service)]
    assert all(choice["ends"] == ["length"] for each in whole for choice in each["choices"].values())
    assert [each["usage"][0] for each in whole] == [1500, 1500, 1500, 3000, 1500, 1500]
    return whole


@pytest.mark.timeout(900)
def test_streams_of_a_killed_generator_resume_without_a_difference(
    service: Running, expected: list[dict[str, Any]]
) -> None:
    before = _retries(service, "streaming")
    # On a busy machine all answers of the generator that is killed may just have ended.
    for _ in range(3):
        _await_all_replicas(service)
        streams = _begun_streams(service)
        os.kill(_busiest_generator(service), signal.SIGKILL)
        assert [stream.whole() for stream in streams] == expected
        if comes_true(lambda: _retries(service, "streaming") > before, deadline_s=20):
            return
    pytest.fail("no stream was resumed")


def test_streams_resume_after_all_generators_were_killed(service: Running, expected: list[dict[str, Any]]) -> None:
    _await_all_replicas(service)
    streams = _begun_streams(service)
    for pid in service.replicas("Generator"):
        os.kill(pid, signal.SIGKILL)
    assert [stream.whole() for stream in streams] == expected


LONG_REQUEST = {"messages": messages("hi"), "temperature": 1.0, "seed": 3, **ENDLESS}


@pytest.fixture(scope="module")
def expected_long_answer(service: Running) -> list[Any]:
    """The answer when undisturbed."""
    response = service.post(**LONG_REQUEST).json()
    assert response["usage"]["completion_tokens"] == ENDLESS["max_tokens"]
    return list(response["choices"])


def test_a_stream_of_a_silent_generator_resumes_elsewhere(service: Running, expected_long_answer: list[Any]) -> None:
    """As if its host had lost power: no connection is closed. Ray itself takes a minute to detect that."""
    _await_all_replicas(service)
    stream = _Stream(service, LONG_REQUEST)
    pid = _busiest_generator(service, seconds=1.0)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        whole = stream.whole()
    finally:
        os.kill(pid, signal.SIGKILL)
    assert SILENCE_S < time.monotonic() - stopped < 60
    assert whole["choices"][0]["text"] == expected_long_answer[0]["message"]["content"]
    assert whole["usage"][0] == ENDLESS["max_tokens"]


def test_an_unstreamed_answer_resumes_too(service: Running, expected_long_answer: list[Any]) -> None:
    _await_all_replicas(service)
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        answer = client.submit(service.post, **LONG_REQUEST)
        # The answer is not streamed, but writing it takes computing time.
        pid = _busiest_generator(service, seconds=1.0)
        assert not answer.done()
        os.kill(pid, signal.SIGKILL)
        response = answer.result(120)
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == expected_long_answer
    assert response.json()["usage"]["completion_tokens"] == ENDLESS["max_tokens"]


@pytest.mark.parametrize("stage", ["Preprocessor", "VisionEncoder"])
def test_callers_of_an_unreachable_stage_get_an_error(service: Running, stage: str) -> None:
    """As if the network between two hosts had failed: no connection is closed, and Ray sees no fault. The stage has no
    other replica."""
    _await_all_replicas(service)
    ask = {"messages": messages(content(plain("olive"), "What?")), "max_tokens": 3}
    [pid] = service.replicas(stage)
    os.kill(pid, signal.SIGSTOP)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as clients:
            responses = [*clients.map(lambda _: service.post(**ask), range(2))]
    finally:
        os.kill(pid, signal.SIGCONT)
    for response in responses:
        assert response.status_code == 503, response.text
        assert response.json()["error"]["code"] in ("unavailable", "replica_lost")
        assert 10 < response.elapsed.total_seconds() < 60
    _await_all_replicas(service)
    assert service.post(**ask).status_code == 200


@pytest.mark.parametrize("stage", ["Preprocessor", "VisionEncoder"])
def test_streams_survive_the_loss_of_an_earlier_stage(
    service: Running, expected: list[dict[str, Any]], stage: str
) -> None:
    _await_all_replicas(service)
    streams = _begun_streams(service)
    service.printed()
    [pid] = service.replicas(stage)
    os.kill(pid, signal.SIGKILL)
    assert [stream.whole() for stream in streams] == expected
    _await_all_replicas(service)
    told = read_until(service.process, f"{stage} is complete again")
    assert f"{stage} has lost a replica; another one is starting." in told


def test_streams_and_new_requests_survive_the_loss_of_serves_controller(
    service: Running, expected: list[dict[str, Any]]
) -> None:
    _await_all_replicas(service)
    streams = _begun_streams(service)
    [controller] = service.processes("ray::ServeController")
    os.kill(controller, signal.SIGKILL)
    assert service.post(messages=messages("hi"), max_tokens=3).status_code == 200
    assert [stream.whole() for stream in streams] == expected
    # Ray starts another controller, which finds the existing replicas.
    until(lambda: service.processes("ray::ServeController") not in ([], [controller]), deadline_s=60)
    _await_all_replicas(service)


def _assert_broken(service: Running, streams: list[_Stream]) -> None:
    """Assert that the streams broke off, except for those that were already complete because the machine was busy.
    A client retries by itself as long as nothing of an answer has arrived."""
    for stream in streams:
        stream.wait()
    broken = [stream for stream in streams if stream.last != "[DONE]"]
    assert broken
    assert all(isinstance(stream.error, httpx.TransportError) for stream in broken), [s.last for s in broken]
    with Client(service.url, model=service.model) as client:
        assert client.ask("hi", max_tokens=3).text is not None


def test_a_killed_gateway_breaks_its_connections_and_is_replaced(service: Running) -> None:
    _await_all_replicas(service)
    streams = _begun_streams(service, **ENDLESS)
    [gateway] = service.replicas("Gateway")
    os.kill(gateway, signal.SIGKILL)
    _assert_broken(service, streams)
    _await_all_replicas(service)


def test_a_killed_load_balancer_is_restarted(service: Running) -> None:
    _await_all_replicas(service)
    streams = _begun_streams(service, **ENDLESS)
    [balancer] = service.processes("haproxy")
    os.kill(balancer, signal.SIGKILL)
    _assert_broken(service, streams)
    assert service.processes("haproxy") != [balancer]
    assert service.post(messages=messages("hi"), max_tokens=3).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_timed_out_request_gets_our_error_and_frees_the_generator(service: Running, *, stream: bool) -> None:
    """Serve reads the same header, and would respond with plain text."""
    body = {"messages": messages("hi"), "stream": stream, **ENDLESS}
    headers = {"x-request-timeout-seconds": "2"}
    response = httpx.post(f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=60)
    assert response.status_code == (200 if stream else 504)
    last = list(events(response))[-1] if stream else response.json()
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "deadline_exceeded")
    pids = service.replicas("Generator")

    def is_idle() -> bool:
        before = sum(map(_cpu_seconds, pids))
        time.sleep(0.5)
        return sum(map(_cpu_seconds, pids)) - before < 0.2

    until(is_idle)


def _slow_pictures(green: int) -> list[Any]:
    """Return new pictures of a few kilobytes each that take the preprocessor seconds."""
    pictures = [plain((red, green, 0), (6000, 6000)) for red in range(6)]
    return [part for picture in pictures for part in content(picture, "What?")]


def _kill_busy_preprocessor(service: Running) -> None:
    """Kill the preprocessor once it can serve and is computing, which it only does for a request."""
    until(lambda: _health(service) == 200, deadline_s=120)
    [pid] = service.replicas("Preprocessor")
    begun = _cpu_seconds(pid)
    until(lambda: _cpu_seconds(pid) > begun + 0.5, deadline_s=60)
    os.kill(pid, signal.SIGKILL)
    until(lambda: _health(service) == 503)


def test_requests_on_a_killed_replica_are_answered_by_its_successor(service: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        body = {"messages": messages(_slow_pictures(1)), "max_tokens": 3}
        answers = [clients.submit(service.post, **body, stream=stream) for stream in (False, True)]
        _kill_busy_preprocessor(service)
        assert [answer.result(120).status_code for answer in answers] == [200, 200]


def test_pictures_that_kill_twice_are_refused_unlike_others(service: Running) -> None:
    content_of_all = [*_slow_pictures(2), *content(plain("olive"), "?")]
    with concurrent.futures.ThreadPoolExecutor(1) as clients:
        killing = clients.submit(service.post, messages=messages(content_of_all), max_tokens=3)
        _kill_busy_preprocessor(service)
        _kill_busy_preprocessor(service)
        refused = killing.result(120)
    again = messages(content(plain("olive"), "Something else?"))
    for response in (refused, service.post(messages=again, max_tokens=3), service.post(messages=again, stream=True)):
        assert response.status_code == 422, response.text
        assert response.json()["error"]["code"] == "content_refused"
    until(lambda: _health(service) == 200, deadline_s=120)
    assert service.post(messages=messages(content(plain(), "What?")), max_tokens=3).status_code == 200
    assert service.post(messages=messages("What?"), max_tokens=3).status_code == 200


def test_requests_at_a_killed_encoder_are_answered(service: Running) -> None:
    [pid] = service.replicas("VisionEncoder")
    # Stopped first, so that the request is at the replica, or on its way to it, when it is killed.
    os.kill(pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(2) as clients:
        ask = {"messages": messages(content(plain(), "What?")), "max_tokens": 3}
        answers = [clients.submit(service.post, **ask, stream=stream) for stream in (False, True)]
        # Text bypasses the encoder, whatever its state.
        assert service.post(messages=messages("hi"), max_tokens=1).status_code == 200
        os.kill(pid, signal.SIGKILL)
        for answer in answers:
            # Whether or not it had been sent to the replica.
            assert answer.result(120).status_code == 200
    until(lambda: _health(service) == 200, deadline_s=120)
    assert service.post(**ask).status_code == 200
