"""Workers over real HTTP: which may be contacted, and every way to violate the protocol."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest

from deployments.errors import PermissionDeniedError, WorkerFailedError
from deployments.llava_protocol.frames import Frame
from deployments.llava_protocol.worker_client import WorkerClient, canonical
from deployments.settings.llava_protocol import WorkerArgs
from llava_core.errors import RequestError
from tests.deployments.llava_protocol.original_worker import Script, original_worker, words
from tests.sockets import chunked, scripted, whole

BODY = b'{"prompt": "USER: hi", "stop": "</s>"}'
GOOD = b'{"text": "USER: hi Hel", "error_code": 0}\0'


def client(**args: Any) -> WorkerClient:
    """Return a client that is allowed to use the loopback interface."""
    return WorkerClient(WorkerArgs.model_validate({"allowed_networks": ["127.0.0.0/8"], **args}))


async def frames(asking: WorkerClient, name: str) -> list[Frame]:
    return [frame async for frame in asking.generate(name, BODY)]


def answered(script: Script, **args: Any) -> list[Frame]:
    with original_worker(script) as worker:
        return asyncio.run(frames(client(**args), worker.url))


def failure(doing: Any) -> WorkerFailedError:
    with pytest.raises(WorkerFailedError) as caught:
        asyncio.run(doing)
    return caught.value


def test_frames_arrive_as_the_worker_sends_them() -> None:
    with original_worker(words(" Hel", "lo")) as worker:
        got = asyncio.run(frames(client(), worker.url))
        assert worker.asked == [json.loads(BODY)]
    assert got == [Frame("USER: hi Hel"), Frame("USER: hi Hello")]


def test_a_workers_own_errors_are_passed_on() -> None:
    text = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
    sent = json.dumps({"text": text, "error_code": 1}).encode() + b"\0"
    assert answered(lambda _: [sent]) == [Frame(text, 1)]


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (lambda _: [], "cut_off"),
        (lambda _: [GOOD, b'{"text": "USER'], "cut_off"),
        (lambda _: [b"<html>\0"], "garbage"),
        (lambda _: [GOOD, b"{}\0"], "garbage"),
        (lambda _: [None], "silent"),
        (lambda _: [GOOD, None], "silent"),
    ],
)
def test_an_invalid_stream_is_a_failure(script: Script, kind: str) -> None:
    with original_worker(script) as worker:
        assert failure(frames(client(silence_s=0.3), worker.url)).kind == kind


def test_valid_frames_are_passed_on_before_the_failure() -> None:
    async def read(url: str) -> Frame:
        answering = client().generate(url, BODY)
        first = await anext(answering)
        with pytest.raises(WorkerFailedError):
            await anext(answering)
        return first

    with original_worker(lambda _: [GOOD, b"oops\0"]) as worker:
        assert asyncio.run(read(worker.url)) == Frame("USER: hi Hel")


def test_an_endless_answer_is_a_failure() -> None:
    with original_worker(lambda _: itertools.repeat(GOOD)) as worker:
        assert failure(frames(client(answer_timeout_s=0.2), worker.url)).kind == "too_long"


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (whole("500 Internal Server Error", b""), "unreachable"),
        (whole("200 OK", GOOD, "content-encoding: gzip"), "garbage"),
        # Redirects are not followed.
        (whole("302 Found", b"", "location: http://169.254.169.254/"), "unreachable"),
        (b"no HTTP at all\r\n\r\n", "unreachable"),
        (b"", "unreachable"),
        # The worker dies in the middle.
        (HEAD + chunked(GOOD), "cut_off"),
        (HEAD + chunked(b'{"text": "US'), "cut_off"),
    ],
)
def test_an_invalid_response_is_a_failure(response: bytes, kind: str) -> None:
    with scripted(response) as worker:
        assert failure(frames(client(), worker.url)).kind == kind


def test_an_unreachable_worker_is_a_failure() -> None:
    with original_worker() as worker:
        gone = worker.url
    assert failure(frames(client(), gone)).kind == "unreachable"
    assert failure(client().status(gone)).kind == "unreachable"


def test_leaving_early_ends_the_request_at_the_worker() -> None:
    async def one(url: str) -> None:
        answering = client().generate(url, BODY)
        assert await anext(answering) == Frame("USER: hi Hel")
        await answering.aclose()

    with original_worker(lambda _: [GOOD, None]) as worker:
        asyncio.run(one(worker.url))
        assert worker.hung_up.wait(10)


def test_a_status_is_that_sent_by_the_worker() -> None:
    with original_worker() as worker:
        worker.status = {"model_names": ["a", "b"], "speed": 2, "queue_length": 3}
        status = asyncio.run(client().status(worker.url))
    assert (status.model_names, status.speed, status.queue_length) == (["a", "b"], 2, 3)


@pytest.mark.parametrize(
    "status",
    [
        None,
        [],
        {},
        {"model_names": [], "speed": 1, "queue_length": 0},
        {"model_names": ["x"] * 65, "speed": 1, "queue_length": 0},
        {"model_names": "x", "speed": 1, "queue_length": 0},
        {"model_names": ["x"], "speed": -1, "queue_length": 0},
        {"model_names": ["x"], "speed": float("inf"), "queue_length": 0},
        {"model_names": ["x"], "speed": 1, "queue_length": -1},
        {"model_names": ["x" * 100_000], "speed": 1, "queue_length": 0},
    ],
    ids=lambda status: str(status)[:40],
)
def test_an_invalid_status_is_a_failure(status: Any) -> None:
    with original_worker() as worker:
        worker.status = status
        assert failure(client().status(worker.url)).kind == "garbage"


def test_a_status_that_does_not_arrive_in_time_is_a_failure() -> None:
    def drip(connection: Any) -> None:
        connection.sendall(HEAD)
        connection.settimeout(0.02)
        while True:
            connection.sendall(chunked(b" "))
            try:
                if not connection.recv(1):
                    return
            except TimeoutError:
                continue

    with scripted(drip) as worker:
        assert failure(client(status_timeout_s=0.2).status(worker.url)).kind == "silent"


def test_model_names_that_cannot_be_displayed_are_left_out() -> None:
    with original_worker() as worker:
        worker.status = {"model_names": ["good", "", "x" * 129, "a\nb", "\x1b[31m"], "speed": 1, "queue_length": 0}
        assert asyncio.run(client().status(worker.url)).names() == ("good",)


def test_no_worker_may_be_contacted_unless_hosts_are_allowed() -> None:
    off = WorkerClient(WorkerArgs())
    assert off.is_off
    with pytest.raises(PermissionDeniedError, match="allowed_hosts"):
        off.check("http://gpu1:21002")


ALLOWED = WorkerArgs(allowed_hosts=("gpu1:21002", "*.inside.example"), allow_http=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("http://gpu1:21002", "http://gpu1:21002"),
        ("http://gpu1:21002/", "http://gpu1:21002"),
        ("HTTP://GPU1:21002", "http://gpu1:21002"),
        ("https://a.inside.example:443", "https://a.inside.example"),
    ],
)
def test_an_allowed_workers_address_is_canonicalised(name: str, expected: str) -> None:
    assert WorkerClient(ALLOWED).check(name) == canonical(name) == expected


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("http://gpu1:21003", PermissionDeniedError),
        ("http://gpu2:21002", PermissionDeniedError),
        ("http://169.254.169.254", PermissionDeniedError),
        ("http://2852039166:21002", PermissionDeniedError),
        ("http://gpu1.evil.example:21002", PermissionDeniedError),
        ("http://user:password@gpu1:21002", RequestError),
        ("http://gpu1:21002/admin", RequestError),
        ("http://gpu1:21002?x", RequestError),
        ("http://gpu1:21002?", RequestError),
        ("http://gpu1:21002#", RequestError),
        ("http://gpu1:21002/#x", RequestError),
        ("file:///etc/passwd", RequestError),
        ("gpu1:21002", RequestError),
        ("", RequestError),
    ],
)
def test_any_other_address_of_a_worker_is_refused(name: str, error: type[RequestError]) -> None:
    with pytest.raises(error) as caught:
        WorkerClient(ALLOWED).check(name)
    assert caught.value.param == "worker_name"


def test_plain_http_must_be_allowed_explicitly() -> None:
    strict = WorkerClient(WorkerArgs(allowed_hosts=("gpu1:21002",)))
    with pytest.raises(PermissionDeniedError):
        strict.check("http://gpu1:21002")
    assert strict.check("https://gpu1:21002")


@pytest.mark.parametrize("leads_to", [["169.254.169.254"], ["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], []])
def test_a_name_with_an_internal_address_is_not_contacted(leads_to: Sequence[str]) -> None:
    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return leads_to

    asking = WorkerClient(ALLOWED, resolve=resolve)
    for doing in (asking.status("http://gpu1:21002"), frames(asking, "http://gpu1:21002")):
        error = failure(doing)
        assert (error.kind, error.reason) == ("unreachable", "its host has no address that may be asked")
