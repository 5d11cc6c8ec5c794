"""Settings of the page: unknown ones are errors, and nothing is kept by default."""

import pytest
from pydantic import ValidationError

from deployments.page.settings import LogArgs, PageArgs


def test_by_default_nothing_is_kept_and_only_this_machine_has_access() -> None:
    args = PageArgs()
    assert (args.log, args.moderation, args.allow_anyone) == (None, None, False)


@pytest.mark.parametrize("wrong", [{"api_key": "k"}, {"log": {"folder": "x", "days": 0}}, {"log": {"days": 3}}])
def test_unknown_and_out_of_bounds_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PageArgs.model_validate(wrong)


def test_pictures_are_not_kept_by_default() -> None:
    assert not LogArgs.model_validate({"folder": "log"}).pictures
