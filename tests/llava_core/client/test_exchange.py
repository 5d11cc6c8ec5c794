"""Addresses, keys and a request's attempts, without sending anything."""

import httpx
import pytest

from llava_core.client import exchange
from llava_core.client.errors import (
    AnswerInterruptedError,
    ConnectionFailedError,
    RateLimitError,
    ServiceError,
    TimeoutExceededError,
)
from llava_core.client.events import StreamedAnswer
from llava_core.client.exchange import Attempts, Service, connecting, reading
from llava_core.client.requests import Call


@pytest.mark.parametrize(
    ("url", "asks_proxies"),
    [
        ("http://127.0.0.1:8000", False),
        ("http://localhost", False),
        ("http://[::1]:8000/v1", False),
        ("https://example.com", True),
        ("http://10.0.0.1", True),
    ],
)
def test_proxies_are_used_only_for_other_machines(url: str, *, asks_proxies: bool) -> None:
    assert Service(url).http_options()["trust_env"] is asks_proxies


def test_keys_are_sent_but_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "environments")
    service = Service(api_key="given")
    assert "given" not in repr(service)
    assert service.http_options()["headers"] == {"authorization": "Bearer given"}
    assert Service().http_options()["headers"] == {"authorization": "Bearer environments"}


@pytest.mark.parametrize("url", ["nonsense", "", "ftp://x", "http://", "http://[::1", "http://x:port"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(ServiceError, match="is not a valid address"):
        Service(url).http_options()


def test_each_attempt_gets_the_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(exchange.time, "monotonic", lambda: now)
    attempts = Attempts(Service(timeout_s=60), Call("GET", "/", deadline_s=5))
    first = attempts.request()
    assert (first["headers"]["x-request-timeout-seconds"], first["timeout"].read) == ("5.000", 6)
    now = 103
    assert attempts.request()["headers"]["x-request-timeout-seconds"] == "2.000"
    with pytest.raises(RateLimitError):
        attempts.wait_s(RateLimitError("x", status=429, retry_after_s=2))
    now = 105.5
    attempts.check_time()
    with pytest.raises(TimeoutExceededError, match="within 5 s"):
        attempts.request()
    now = 106.5
    with pytest.raises(TimeoutExceededError, match="within 5 s"):
        attempts.check_time()


def test_without_a_deadline_no_timeout_header_is_sent() -> None:
    attempts = Attempts(Service(timeout_s=60), Call("GET", "/"))
    request = attempts.request()
    assert "x-request-timeout-seconds" not in request["headers"]
    assert (request["timeout"].read, request["timeout"].connect) == (60, 10)
    attempts.check_time()


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), ConnectionFailedError),
        (httpx.ConnectTimeout(""), ConnectionFailedError),
        (httpx.ReadError(""), ConnectionFailedError),
        (httpx.ReadTimeout(""), TimeoutExceededError),
        (httpx.RemoteProtocolError("bad"), ConnectionFailedError),
    ],
)
def test_httpx_errors_before_an_answer_become_our_own(raised: Exception, expected: type[ServiceError]) -> None:
    with pytest.raises(expected, match="http://x"), connecting("http://x"):
        raise raised


@pytest.mark.parametrize("raised", [httpx.ReadError("x"), httpx.ReadTimeout("x"), httpx.DecodingError("x")])
def test_httpx_errors_interrupt_an_answer_unless_it_is_complete(raised: Exception) -> None:
    answer = StreamedAnswer()
    with pytest.raises(AnswerInterruptedError), reading(answer):
        raise raised
    list(answer.feed(b"data: [DONE]\n\n"))
    with reading(answer):
        raise raised
