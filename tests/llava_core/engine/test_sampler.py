"""Sampling: each parameter against a slow, obvious reference; random numbers determined by arguments; bad logits."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from llava_core.engine.sampler import (
    choose,
    filtered_probabilities,
    is_finite,
    is_greedy,
    needs_processing,
    peaks,
    process,
    takes_likeliest,
    token_logprob,
    uniform,
)
from llava_core.types import SamplingParams

VOCAB = 8
tokens = st.integers(0, VOCAB - 1)
# Tenths, so that ties arise by design and not from rounding.
rows = st.lists(st.integers(-50, 50).map(lambda value: value / 10), min_size=VOCAB, max_size=VOCAB)
numbers = st.floats(0, 1, exclude_max=True)
shapes = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.01, 0.33, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
penalties = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.3, 2.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.7]),
        "frequency_penalty": st.sampled_from([-1.0, 0.4]),
        "logit_bias": st.lists(st.tuples(tokens, st.sampled_from([-100.0, -1.5, 3.0])), max_size=3).map(tuple),
        "min_tokens": st.integers(0, 4),
    },
)


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value - max(values)) for value in values]
    return [weight / sum(weights) for weight in weights]


def reference_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Sorts, filters and normalises, one token at a time. Rejects examples that hinge on rounding."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if params.top_k:
        order = order[: params.top_k]
    weights = dict(zip(order, softmax([logits[token] / params.temperature for token in order]), strict=True))
    kept, reached = [], 0.0
    for token in order:
        assume(abs(reached - params.top_p) > 1e-6)
        if reached >= params.top_p:
            break
        kept.append(token)
        reached += weights[token]
    least = params.min_p * weights[order[0]]
    assume(all(abs(weights[token] - least) > 1e-6 or logits[token] == logits[order[0]] for token in kept))
    kept = [token for token in kept if weights[token] >= least - 1e-9]
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


@given(logits=rows, params=shapes)
def test_filters_match_the_slow_reference(logits: list[float], params: SamplingParams) -> None:
    expected = torch.tensor(reference_probabilities(logits, params))
    torch.testing.assert_close(filtered_probabilities(torch.tensor(logits), params), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.0001}, [1.0, 0, 0, 0]),
        ({"top_p": 1e-300}, [1.0, 0, 0, 0]),
        ({"min_p": 0.25}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        # top-p applies to what top-k kept, min-p to what both kept.
        ({"top_k": 2, "top_p": 0.6}, [1.0, 0, 0, 0]),
        ({"top_p": 0.8, "min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_each_filter_does_what_its_name_says(params: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    probabilities = filtered_probabilities(logits, SamplingParams(temperature=1.0, **params))
    torch.testing.assert_close(probabilities, torch.tensor(expected))


def test_top_k_keeps_the_first_of_equal_tokens() -> None:
    probabilities = filtered_probabilities(torch.zeros(5), SamplingParams(temperature=1.0, top_k=2))
    assert probabilities.tolist() == [0.5, 0.5, 0, 0, 0]


def test_temperature_sharpens_and_flattens() -> None:
    logits = torch.tensor([2.0, 1.0])
    cold, warm, hot = (
        filtered_probabilities(logits, SamplingParams(temperature=value))[0].item() for value in (0.5, 1.0, 2.0)
    )
    assert cold > warm > hot > 0.5
    assert cold == pytest.approx(1 / (1 + math.exp(-2)))


def reference_process(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], ends: set[int]
) -> list[float]:
    """Applies penalties and bias token by token, in the documented order of the parameters."""
    values = list(logits)
    for token in range(len(values)):
        if token in prompt or token in output:
            factor = params.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        if token in output:
            values[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
        values[token] += sum(bias for biased, bias in params.logit_bias if biased == token)
        if token in ends and len(output) < params.min_tokens:
            values[token] = -math.inf
    return values


@given(
    logits=rows,
    options=penalties,
    prompt=st.lists(tokens | st.just(-200), max_size=5).map(lambda drawn: [1, *drawn]),
    output=st.lists(tokens, max_size=6),
    ends=st.sets(tokens, max_size=3),
)
def test_penalties_and_bias_match_the_slow_reference(
    logits: list[float], options: dict[str, Any], prompt: list[int], output: list[int], ends: set[int]
) -> None:
    params = SamplingParams(**options)
    given_logits = torch.tensor(logits)
    processed = process(given_logits, params, prompt, output, ends)
    expected = torch.tensor(reference_process(logits, params, prompt, output, ends))
    torch.testing.assert_close(processed, expected, atol=1e-5, rtol=1e-5)
    assert given_logits.tolist() == pytest.approx(logits, abs=1e-6), "the model's own logits were changed"
    if not needs_processing(params, len(output)):
        assert processed is given_logits


def test_the_repetition_penalty_lowers_positive_and_negative_logits() -> None:
    processed = process(torch.tensor([4.0, -4.0, 4.0]), SamplingParams(repetition_penalty=2.0), [0], [1], set())
    assert processed.tolist() == [2.0, -8.0, 4.0]


def test_presence_and_frequency_penalties_ignore_the_prompt() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    assert process(torch.zeros(3), params, [0, 0], [1, 1, 2], set()).tolist() == [0, -2.0, -1.5]


def test_end_tokens_are_never_drawn_before_min_tokens() -> None:
    params = SamplingParams(min_tokens=2)
    logits = torch.tensor([0.0, 5.0, 9.0])
    drawn = [choose(process(logits, params, [0], [0] * num, {1, 2}), params, lambda: 0.0) for num in range(3)]
    assert drawn == [0, 0, 2]


def test_half_precision_logits_are_processed_in_float32() -> None:
    processed = process(torch.ones(3, dtype=torch.bfloat16), SamplingParams(logit_bias=((0, 0.001),)), [0], [], set())
    assert processed[0] > 1


def test_temperature_zero_takes_the_largest_logit_and_no_random_number() -> None:
    def never() -> float:
        raise AssertionError

    assert choose(torch.tensor([0.1, 3.0, 2.9]), SamplingParams(temperature=0, top_p=0.1), never) == 1


@given(logits=rows, params=shapes, number=numbers | st.sampled_from([0.0, 1 - 2**-53]))
def test_a_token_of_probability_zero_is_never_chosen(
    logits: list[float], params: SamplingParams, number: float
) -> None:
    logits[0] = logits[-1] = -math.inf
    chosen = choose(torch.tensor(logits), params, lambda: number)
    assert filtered_probabilities(torch.tensor(logits), params)[chosen] > 0


@given(logits=rows, params=shapes)
def test_evenly_spread_numbers_choose_tokens_in_proportion(logits: list[float], params: SamplingParams) -> None:
    num = 60
    values = torch.tensor(logits)
    drawn = Counter(choose(values, params, lambda i=i: (i + 0.5) / num) for i in range(num))
    for token, probability in enumerate(filtered_probabilities(values, params).tolist()):
        assert abs(drawn[token] - num * probability) <= 1.001


def test_drawn_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.0)
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = Counter(choose(logits, params, lambda i=i: uniform(3, 0, i)) for i in range(4000))
    assert [drawn[token] / 4000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_one_random_number_is_drawn_per_token() -> None:
    asked = []
    choose(torch.zeros(4), SamplingParams(temperature=1.0, top_k=3, top_p=0.9), lambda: asked.append(1) or 0.3)
    assert asked == [1]


def test_random_numbers_are_the_same_in_every_process() -> None:
    """Needed to resume an answer on another replica exactly as it would have continued here."""
    assert [uniform(*place) for place in ((0, 0, 0), (7, 1, 30), (2**63 - 1, 0, 5))] == pytest.approx(
        [0.5013997148167615, 0.6561753916813553, 0.5584228914381719]
    )


def test_a_random_number_depends_on_each_argument() -> None:
    places = [(seed, index, position) for seed in (-1, 1, 11, 111) for index in (0, 1, 11) for position in (1, 11, 111)]
    assert len({uniform(*place) for place in places}) == len(places)


@pytest.mark.parametrize("varied", range(3))
def test_random_numbers_are_uniform_whichever_argument_varies(varied: int) -> None:
    drawn = [uniform(*(number if place == varied else 5 for place in range(3))) for number in range(4000)]
    assert all(0 <= number < 1 for number in drawn)
    tenths = Counter(int(number * 10) for number in drawn)
    assert all(abs(tenths[tenth] - 400) < 80 for tenth in range(10))
    neighbours = Counter((one < 0.5, other < 0.5) for one, other in pairwise(drawn))
    assert all(abs(times - 1000) < 130 for times in neighbours.values())


@given(logits=rows, token=tokens, num_top=st.integers(0, VOCAB + 3))
def test_logprobs_equal_a_softmax_and_come_with_the_top_tokens(logits: list[float], token: int, num_top: int) -> None:
    expected = [math.log(probability) for probability in softmax(logits)]
    result = token_logprob(torch.tensor(logits), token, num_top)
    assert result.token == token
    assert result.logprob == pytest.approx(expected[token], abs=1e-5)
    assert [value for _, value in result.top] == pytest.approx(sorted(expected, reverse=True)[:num_top], abs=1e-5)
    assert all(value == pytest.approx(expected[other], abs=1e-5) for other, value in result.top)
    assert len({other for other, _ in result.top}) == min(num_top, VOCAB)


def test_logprobs_of_half_precision_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.bfloat16)
    assert token_logprob(logits, 1, 0).logprob == pytest.approx(logits.double().log_softmax(-1)[1].item(), abs=1e-6)


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, math.nan, 1.0],
        [math.nan] * 3,
        [0.0, math.inf, 1.0],
        [-math.inf] * 3,
        [-math.inf, math.nan, 0.0],
        [math.inf, -math.inf, math.nan],
    ],
)
def test_logits_that_are_not_finite_are_detected(logits: list[float]) -> None:
    assert not is_finite(torch.tensor(logits))
    assert not is_finite(torch.tensor([logits, logits]))


def test_minus_infinity_for_some_tokens_is_valid() -> None:
    assert is_finite(torch.tensor([0.0, -math.inf, -1e30]))


def test_the_repetition_penalty_ignores_picture_placeholders() -> None:
    assert process(torch.zeros(5), SamplingParams(repetition_penalty=1.2), [-200, -200], [], ()).tolist() == [0.0] * 5


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert choose(torch.tensor([0.0, 1.0, 5.0, 2.0]), SamplingParams(temperature=temperature), lambda: 0.5) == 2


values = st.sampled_from([0.0, 1.0, -2.5, 7.0, math.nan, math.inf, -math.inf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.lists(st.lists(values, min_size=5, max_size=5), min_size=1, max_size=6))
def test_rows_processed_together_give_the_same_as_alone(dtype: torch.dtype, rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, dtype=dtype)
    are_finite, likeliest = peaks(logits)
    assert are_finite == [is_finite(row) for row in logits]
    assert likeliest == [choose(row, SamplingParams(temperature=0), lambda: 0.5) for row in logits]


def test_peaks_of_no_rows_are_empty() -> None:
    assert peaks(torch.empty(0, 7)) == ([], [])


def test_is_greedy_at_tiny_temperatures_only() -> None:
    assert [is_greedy(SamplingParams(temperature=value)) for value in (0.0, 1e-6, 1e-4, 1.0)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, True),
        ({"temperature": 1.0}, False),
        ({"logprobs": 0}, False),
        ({"min_tokens": 3}, False),
        ({"min_tokens": 2}, True),
        ({"logit_bias": ((5, 1.0),)}, False),
        ({"presence_penalty": 0.5}, False),
    ],
)
def test_only_plain_greedy_answers_need_just_the_likeliest_token(params: dict[str, Any], expected: object) -> None:
    assert takes_likeliest(SamplingParams(**{"temperature": 0.0, **params}), num_output=2) is expected
