"""When a request is sent again, and how long to wait before. Numbers alone: sends nothing and never sleeps."""

from __future__ import annotations

import email.utils
import random
from dataclasses import dataclass
from datetime import UTC, datetime

from llava_core.client.errors import ServiceError


@dataclass(frozen=True)
class Retries:
    """`most` further attempts. Waits double from `first_s` on and are drawn by lot, so that clients that were refused
    together do not come back together; nobody waits for longer than `longest_s`, whatever Retry-After says."""

    most: int = 4
    first_s: float = 0.5
    longest_s: float = 30.0

    def __post_init__(self) -> None:
        if self.most < 0 or not 0 < self.first_s <= self.longest_s:
            raise ValueError(f"most must not be negative, and first_s above 0 and not above longest_s: {self}")

    def wait_s(self, error: ServiceError, attempt: int) -> float | None:
        """Seconds to wait after so many failed attempts before this one, None where another is not worth it."""
        if attempt >= self.most or not error.is_temporary:
            return None
        if error.retry_after_s is None:
            return random.uniform(0, min(self.longest_s, self.first_s * 2**attempt))
        if error.retry_after_s > self.longest_s:
            return None
        # Never before the time that was named.
        return error.retry_after_s + random.uniform(0, self.first_s)


NO_RETRIES = Retries(most=0)
DEFAULT_RETRIES = Retries()


def read_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which has seconds or a date; None where it has neither."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    # A date without a zone is of Greenwich.
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
