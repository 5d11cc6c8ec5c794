"""The token budget of an answer, and errors that name prompt length, max_tokens and context."""

import pytest

from llava_core.errors import PromptTooLongError, RequestError
from llava_core.prompts.budget import token_budget


def test_without_max_tokens_the_answer_may_fill_the_context() -> None:
    assert token_budget(10, None, 512) == 502


def test_max_tokens_that_fit_are_kept() -> None:
    assert token_budget(10, 502, 512) == 502
    assert token_budget(511, 1, 512) == 1


def test_max_tokens_beyond_the_context_name_all_three_numbers() -> None:
    with pytest.raises(
        PromptTooLongError, match=r"max_tokens is 503.*prompt of 10.*only 502.*context of 512"
    ) as caught:
        token_budget(10, 503, 512)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("length", [512, 600])
def test_a_prompt_without_room_is_refused(length: int) -> None:
    with pytest.raises(PromptTooLongError, match=f"{length} tokens.*512") as caught:
        token_budget(length, None, 512)
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt is empty") as caught:
        token_budget(0, 5, 512)
    assert caught.value.param == "messages"
