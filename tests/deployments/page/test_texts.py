"""The text that visitors agree to says what is kept, and for how long."""

from pathlib import Path

import pytest

from deployments.page.settings import LogArgs
from deployments.page.texts import consent


@pytest.mark.parametrize(("days", "expected"), [(1, "for 1 day,"), (30, "for 30 days,")])
def test_the_retention_period_is_stated(days: int, expected: str) -> None:
    assert expected in consent(LogArgs(folder=Path("log"), days=days))


def test_it_is_stated_whether_pictures_are_kept() -> None:
    assert "but not your pictures" in consent(LogArgs(folder=Path("log")))
    assert "and your pictures" in consent(LogArgs(folder=Path("log"), pictures=True))


def test_the_consent_text_can_be_replaced() -> None:
    assert consent(LogArgs(folder=Path("log"), consent="Our words.")) == "Our words."
