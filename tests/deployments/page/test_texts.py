"""The text that visitors agree to says what is kept, and for how long."""

from pathlib import Path

import pytest

from deployments.page.settings import LogArgs
from deployments.page.texts import consent


@pytest.mark.parametrize(("days", "told"), [(1, "for 1 day,"), (30, "for 30 days,")])
def test_the_time_is_told(days: int, told: str) -> None:
    assert told in consent(LogArgs(folder=Path("log"), days=days))


def test_whether_pictures_are_kept_is_told() -> None:
    assert "but not your pictures" in consent(LogArgs(folder=Path("log")))
    assert "and your pictures" in consent(LogArgs(folder=Path("log"), pictures=True))


def test_whoever_runs_the_page_may_say_it_in_their_own_words() -> None:
    assert consent(LogArgs(folder=Path("log"), consent="Our words.")) == "Our words."
