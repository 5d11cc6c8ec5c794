"""Sampling parameters: every field is used, and every bound is enforced."""

import json
from typing import Any

import pytest

from deployments.openai_api.sampling_schema import SamplingBody
from deployments.openai_api.schema import parse_body
from llava_core.engine.sampler import is_greedy
from llava_core.errors import RequestError
from llava_core.types import GREEDY_BELOW, SamplingParams


def _sampling(**fields: Any) -> SamplingParams:
    parsed = parse_body(json.dumps(fields).encode(), SamplingBody, max_text=1000)
    return parsed.sampling(max_tokens=parsed.max_tokens, logprobs=None)


def test_every_field_is_taken_over() -> None:
    values: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "seed": 7,
        "ignore_eos": True,
        "min_tokens": 2,
        "n": 3,
    }
    given = _sampling(**values, stop=["a", "b"], stop_token_ids=[4, 5], logit_bias={"7": -100, "8": 1.5})
    assert given == SamplingParams(**values, stop=("a", "b"), stop_token_ids=(4, 5), logit_bias=((7, -100.0), (8, 1.5)))


def test_null_means_the_default() -> None:
    assert _sampling(**dict.fromkeys(SamplingBody.model_fields)) == SamplingParams()


@pytest.mark.parametrize(("given", "drawn"), [(GREEDY_BELOW * 0.99, 0.0), (GREEDY_BELOW, GREEDY_BELOW)])
def test_a_temperature_too_low_to_sample_is_greedy(given: float, drawn: float) -> None:
    sampling = _sampling(temperature=given)
    assert sampling.temperature == drawn
    assert is_greedy(SamplingParams(temperature=given)) == is_greedy(sampling) == (drawn == 0)


def test_token_zero_may_have_a_bias() -> None:
    assert _sampling(logit_bias={"0": 1}).logit_bias == ((0, 1.0),)


def test_one_stop_string_needs_no_list() -> None:
    assert _sampling(stop="x").stop == ("x",)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"7": 1, "07": 2}}, "logit_bias"),
        ({"logit_bias": {"00": 1}}, "logit_bias"),
        ({"logit_bias": {"7\n": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": [-200]}, "stop_token_ids[0]"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ],
)
def test_a_wrong_value_is_refused_naming_the_field(fields: dict, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        _sampling(**fields)
    assert caught.value.param == param
