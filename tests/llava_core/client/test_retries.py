"""Which errors are retried, and how long to wait before."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from llava_core.client.errors import ConnectionFailedError, RateLimitError, ServerError, ServiceError
from llava_core.client.retries import Retries, read_retry_after


def test_waits_grow_to_a_bound_with_jitter() -> None:
    retries = Retries(most=20, first_s=1, longest_s=8)
    for attempt, bound in enumerate((1, 2, 4, 8, 8)):
        waits = [retries.wait_s(ConnectionFailedError("x"), attempt) for _ in range(200)]
        found = [wait for wait in waits if wait is not None]
        assert len(found) == len(waits)
        assert bound / 2 < max(found) <= bound
        assert min(found) < bound / 2


def test_waits_are_never_shorter_than_retry_after() -> None:
    retries = Retries(first_s=1, longest_s=8)
    waits = {retries.wait_s(RateLimitError("x", status=429, retry_after_s=3), 0) for _ in range(100)}
    assert len(waits) > 1
    assert all(wait is not None and 3 <= wait <= 4 for wait in waits)
    assert retries.wait_s(RateLimitError("x", status=429, retry_after_s=9), 0) is None


@pytest.mark.parametrize(
    ("error", "is_repeated"),
    [
        (ConnectionFailedError("x"), True),
        (ServerError("x", status=502), True),
        (ServerError("x", status=503), True),
        (ServerError("x", status=500), False),
        (ServiceError("x", status=400), False),
        (ServiceError("x"), False),
    ],
)
def test_only_transient_errors_are_retried(error: ServiceError, *, is_repeated: bool) -> None:
    assert (Retries().wait_s(error, 0) is not None) == is_repeated
    assert Retries(most=3).wait_s(error, 3) is None


@pytest.mark.parametrize("given", [{"most": -1}, {"first_s": 0}, {"first_s": 5, "longest_s": 1}])
def test_bounds_are_checked(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="most must not be negative"):
        Retries(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, None), ("7", 7), ("-3", None), ("soon", None), ("", None), ("9" * 5000, 999_999_999)]
)
def test_retry_after_seconds_are_parsed(value: str | None, seconds: float | None) -> None:
    assert read_retry_after(value) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_a_retry_after_date_is_parsed(zone: str) -> None:
    when = datetime.now(UTC) + timedelta(seconds=100)
    text = format_datetime(when, usegmt=True).replace("GMT", zone)
    assert read_retry_after(text) == pytest.approx(100, abs=5)
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
