"""When a request is retried, and how long to back off before. Computes numbers only: sends nothing and never sleeps."""

from __future__ import annotations

import email.utils
import random
from dataclasses import dataclass
from datetime import UTC, datetime

from llava_core.client.errors import ServiceError


@dataclass(frozen=True)
class Retries:
    """Up to `most` retries. Waits have full jitter, so that clients refused together do not retry together; their bound
    doubles from `first_s` up to `longest_s`. A Retry-After above `longest_s` ends the retries."""

    most: int = 4
    first_s: float = 0.5
    longest_s: float = 30.0

    def __post_init__(self) -> None:
        if self.most < 0 or not 0 < self.first_s <= self.longest_s:
            raise ValueError(f"most must not be negative, and first_s above 0 and not above longest_s: {self}")

    def wait_s(self, error: ServiceError, attempt: int) -> float | None:
        """Seconds to wait after this error, with `attempt` failures before it; None where a retry is pointless."""
        if attempt >= self.most or not error.is_temporary:
            return None
        if error.retry_after_s is None:
            return random.uniform(0, min(self.longest_s, self.first_s * 2**attempt))
        if error.retry_after_s > self.longest_s:
            return None
        # Never before the requested time.
        return error.retry_after_s + random.uniform(0, self.first_s)


NO_RETRIES = Retries(most=0)
DEFAULT_RETRIES = Retries()


def read_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None where it holds neither."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    # A date without a time zone is in UTC.
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
