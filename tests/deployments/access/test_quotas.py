"""A key's limits, on a clock that the test moves."""

from datetime import UTC, datetime
from typing import Any

import pytest

from deployments.access.api_keys import ApiKey
from deployments.access.quotas import Quota
from deployments.errors import RateLimitError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _quota(clock: Clock, **limits: int) -> Quota:
    entry: dict[str, Any] = {"id": "a", "sha256": "0" * 64, "created_at": datetime.now(UTC)}
    return Quota(ApiKey(**entry, **limits), clock)


def _refusal(quota: Quota) -> RateLimitError:
    with pytest.raises(RateLimitError) as caught:
        quota.enter()
    return caught.value


def _answer(quota: Quota, num_tokens: int = 0) -> None:
    quota.enter()
    quota.charge(num_tokens)
    quota.leave()


def test_requests_per_minute_are_limited_and_refill_one_by_one(clock: Clock) -> None:
    quota = _quota(clock, requests_per_minute=3)
    for _ in range(3):
        _answer(quota)
    error = _refusal(quota)
    assert (error.limit, error.retry_after_s) == ("requests", 20)
    clock.now += 19.9
    assert _refusal(quota).retry_after_s == 1
    clock.now += 0.1
    _answer(quota)
    _refusal(quota)
    # However long the key is idle, no more than a minute's allowance accumulates.
    clock.now += 3600
    for _ in range(3):
        _answer(quota)
    _refusal(quota)


def test_tokens_per_minute_are_limited_by_actual_use(clock: Clock) -> None:
    quota = _quota(clock, tokens_per_minute=60)
    _answer(quota, 59)
    # One token is left, and it is not yet known how many this request takes.
    _answer(quota, 100)
    error = _refusal(quota)
    assert (error.limit, error.retry_after_s) == ("tokens", 100)
    clock.now += 99.9
    _refusal(quota)
    clock.now += 0.2
    _answer(quota)


def test_concurrent_requests_are_limited_until_one_ends(clock: Clock) -> None:
    quota = _quota(clock, max_concurrent=2)
    quota.enter()
    quota.enter()
    error = _refusal(quota)
    assert (error.limit, error.retry_after_s) == ("concurrent_requests", 1)
    quota.leave()
    quota.enter()


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    quota = _quota(clock, requests_per_minute=2, max_concurrent=1)
    quota.enter()
    for _ in range(5):
        assert _refusal(quota).limit == "concurrent_requests"
    quota.leave()
    quota.enter()
    quota.leave()
    assert _refusal(quota).limit == "requests"


def test_a_key_without_limits_is_unlimited(clock: Clock) -> None:
    quota = _quota(clock)
    for _ in range(1000):
        quota.enter()
        quota.charge(10**9)
