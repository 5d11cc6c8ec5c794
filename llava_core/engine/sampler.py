"""The next token from a row of logits: penalties, temperature, top-k, top-p, min-p, and log-probabilities.

Pure functions of one request's logits, parameters, seed and tokens so far, never of its neighbours: the sample is the
same in any batch, and after an interruption. Knows no models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from random import Random

import torch
from torch import Tensor

from llava_core.types import GREEDY_BELOW, SamplingParams, TokenLogprob


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) determined only by its arguments: answer `index` of a seed, token `position` of the answer."""
    return Random(f"{seed}/{index}/{position}").random()


def is_finite(logits: Tensor) -> bool:
    """Whether the largest logit is finite; that suffices, since a NaN or positive infinity would be the maximum."""
    return bool(torch.isfinite(logits.max()))


def peaks(logits: Tensor) -> tuple[list[bool], list[int]]:
    """For each row of `logits` (rows, vocab), whether `is_finite` holds, and the (first) likeliest token."""
    largest, tokens = logits.max(-1)
    # In one copy: each copy from a device waits for the device.
    are_finite, likeliest = torch.stack((torch.isfinite(largest), tokens)).tolist()
    return list(map(bool, are_finite)), likeliest


def takes_likeliest(params: SamplingParams, num_output: int) -> bool:
    """Whether only the likeliest token of a row of logits is needed."""
    return is_greedy(params) and params.logprobs is None and not needs_processing(params, num_output)


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is taken."""
    return params.temperature < GREEDY_BELOW


def choose(logits: Tensor, params: SamplingParams, draw: Callable[[], float]) -> int:
    """Choose a token id from processed `logits` (vocab,); `draw` returns a number in [0, 1), called once if needed."""
    if is_greedy(params):
        return int(logits.argmax())
    cumulative = filtered_probabilities(logits, params).double().cumsum(-1)
    # right=True: a token of probability 0 is never drawn. The last sum may fall short of 1 by rounding.
    chosen = int(torch.searchsorted(cumulative, draw() * float(cumulative[-1]), right=True))
    return min(chosen, int(cumulative.argmax()))


def process(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], ends: Collection[int]
) -> Tensor:
    """Return `logits` (vocab,) in float32 with bias and penalties, and without `ends` until there are `min_tokens`.

    The repetition penalty counts prompt and answer (https://arxiv.org/abs/1909.05858), presence and frequency penalties
    only the answer, as in OpenAI's API. Anything else that narrows the choice, such as a grammar, would belong here.
    """
    if not needs_processing(params, len(output)):
        return logits
    logits = logits.float().clone()
    if params.repetition_penalty != 1.0:
        known = sorted({token for token in (*prompt, *output) if token >= 0})
        seen = torch.tensor(known, dtype=torch.int64, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[list(counts)] -= params.presence_penalty + params.frequency_penalty * times
    for token, bias in params.logit_bias:
        logits[token] += bias
    if len(output) < params.min_tokens:
        logits[list(ends)] = -torch.inf
    return logits


def needs_processing(params: SamplingParams, num_output: int) -> bool:
    """Whether `process` would change anything."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or num_output < params.min_tokens
    )


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (vocab,) after temperature, top-k, top-p (nucleus: the smallest set reaching top_p) and min-p (the
    tokens with at least that share of the likeliest token's probability), in this order; on the CPU."""
    logits = logits.float().cpu() / params.temperature
    if not params.top_k and params.top_p == 1.0:
        return _min_p(logits.softmax(-1), params.min_p)
    ordered, order = logits.sort(descending=True, stable=True)
    if params.top_k:
        ordered[params.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The likeliest token is kept even if top_p is too small for a float.
    probabilities[1:][before[1:] >= params.top_p] = 0.0
    probabilities = _min_p(probabilities / probabilities.sum(), params.min_p)
    return torch.zeros_like(probabilities).scatter(0, order, probabilities)


def _min_p(probabilities: Tensor, min_p: float) -> Tensor:
    if not min_p:
        return probabilities
    kept = probabilities * (probabilities >= min_p * probabilities.max())
    return kept / kept.sum()


def token_logprob(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """The model's log-probability of `token`, before penalties and temperature, and its `num_top` likeliest tokens."""
    logprobs = logits.float().log_softmax(-1)
    top, ids = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(ids.tolist(), top.tolist(), strict=True)))
