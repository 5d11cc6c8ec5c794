"""Settings of the page: unknown ones are errors, and nothing is kept by default."""

import pytest
from pydantic import ValidationError

from deployments.page.settings import LogArgs, PageArgs


def test_nothing_is_kept_and_nobody_from_elsewhere_comes_by_default() -> None:
    args = PageArgs()
    assert (args.log, args.moderation, args.allow_anyone) == (None, None, False)


@pytest.mark.parametrize("wrong", [{"api_key": "k"}, {"log": {"folder": "x", "days": 0}}, {"log": {"days": 3}}])
def test_what_is_unknown_or_out_of_bounds_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PageArgs.model_validate(wrong)


def test_pictures_are_kept_only_where_that_is_said() -> None:
    assert not LogArgs.model_validate({"folder": "log"}).pictures
