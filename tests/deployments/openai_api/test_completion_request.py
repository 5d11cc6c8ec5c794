"""Completions: a prompt in each of its forms, and what is refused with its location."""

import json
from typing import Any

import pytest

from deployments.openai_api.completion_request import read_completion_request
from deployments.openai_api.reply_form import ReadRequest
from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits
from llava_core.types import CompletionRequest, SamplingParams


def _read(**fields: Any) -> ReadRequest:
    return read_completion_request(json.dumps(fields).encode(), "id", RequestLimits(max_text=20))


@pytest.mark.parametrize(
    ("prompt", "understood"),
    [("Once", "Once"), (["Once"], "Once"), ([1, 5], (1, 5)), ([[1, 5]], (1, 5)), ("", "")],
)
def test_a_prompt_is_text_or_token_ids_single_or_in_a_list(prompt: Any, understood: str | tuple[int, ...]) -> None:
    assert _read(prompt=prompt).generation == CompletionRequest("id", understood, SamplingParams(max_tokens=16))


@pytest.mark.parametrize("prompts", [["Once", "upon", "a"], [[1], [2, 5], [3]]])
def test_several_prompts_become_requests_with_equal_settings(prompts: list[Any]) -> None:
    request = _read(prompt=prompts, n=2, seed=7, stream=True)
    asked = (request.generation, *request.others)
    assert [each.prompt for each in asked] == [tuple(each) if isinstance(each, list) else each for each in prompts]
    assert len({each.request_id for each in asked}) == 3
    assert {each.sampling for each in asked} == {SamplingParams(max_tokens=16, n=2, seed=7)}
    assert request.form.num_answers == 6
    assert request.form.stream


def test_fields_of_the_request_are_taken_over() -> None:
    request = _read(
        prompt="x", max_tokens=7, logprobs=2, n=2, stream=True, stream_options={"include_usage": True}, timings=True
    )
    assert request.generation.sampling == SamplingParams(max_tokens=7, logprobs=2, n=2)
    form = request.form
    assert (form.stream, form.include_usage, form.timings, form.num_answers) == (True, True, True, 2)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [None]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": ["a", 1]}, "prompt[1]", "invalid_value"),
        ({"prompt": [1, "a"]}, "prompt[1]", "invalid_value"),
        ({"prompt": [-200]}, "prompt[0]", "invalid_value"),
        ({"prompt": [[]]}, "prompt[0]", "invalid_value"),
        ({"prompt": ["a"] * 17}, "prompt", "invalid_value"),
        ({"prompt": [[1]] * 6, "n": 3}, "prompt", "invalid_value"),
        ({"prompt": ["x" * 11, "y" * 10]}, "prompt", "text_too_long"),
        ({"prompt": "x" * 21}, "prompt", "text_too_long"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "x", "logprobs": True}, "logprobs", "invalid_value"),
        ({"prompt": "x", "echo": True}, "echo", "unsupported_parameter"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter"),
        ({"prompt": "x", "max_completion_tokens": 2}, "max_completion_tokens", "unsupported_parameter"),
        ({"prompt": "x", "best_of": 2}, "best_of", "unsupported_parameter"),
        ({"prompt": "x", "prompt_embeds": "AAAA"}, "prompt_embeds", "unsupported_parameter"),
    ],
)
def test_a_mistake_is_refused_with_its_location(fields: dict, param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        _read(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_fields_that_change_nothing_are_ignored() -> None:
    fields = {"echo": False, "suffix": None, "best_of": 1, "user": "me"}
    assert _read(prompt="x", **fields).generation.sampling == SamplingParams(max_tokens=16)
