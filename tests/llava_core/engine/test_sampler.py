"""Sampling: filters against a slow obvious reference, seeds, and values that are not finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.engine.sampler import build_generator, filtered_probabilities, sample
from llava_core.errors import EngineError
from llava_core.types import SamplingParams


def reference_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """Sort, keep, normalise; one token at a time."""
    weights = torch.tensor([value / params.temperature for value in logits]).softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda token: -weights[token])
    if params.top_k:
        order = order[: params.top_k]
    total = sum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if reached >= params.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    mass = sum(weights[token] for token in kept)
    return [weights[token] / mass if token in kept else 0.0 for token in range(len(logits))]


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.integers(-50, 50), min_size=2, max_size=12, unique=True),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.1, 0.33, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.2, 1.0, 2.0]),
)
def test_filters_match_the_slow_reference(logits: list[int], top_k: int, top_p: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    values = [value / 10 for value in logits]
    expected = torch.tensor(reference_probabilities(values, params))
    torch.testing.assert_close(filtered_probabilities(torch.tensor(values), params), expected, atol=1e-5, rtol=1e-4)


def test_temperature_zero_takes_the_largest_logit() -> None:
    params = SamplingParams(temperature=0)
    assert sample(torch.tensor([0.1, 3.0, 2.9]), params, build_generator(params)) == 1


def test_a_seed_repeats_its_tokens_and_another_seed_does_not() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        generator = build_generator(params)
        return [sample(logits, params, generator) for _ in range(8)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_sampled_frequencies_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    generator = build_generator(params)
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = torch.bincount(torch.tensor([sample(logits, params, generator) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_an_error(value: float) -> None:
    params = SamplingParams()
    with pytest.raises(EngineError, match="not finite"):
        sample(torch.tensor([0.0, value]), params, build_generator(params))
