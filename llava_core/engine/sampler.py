"""The next token from a row of logits: greedy, temperature, top-k, top-p, with a generator of the request's own.

Pure functions; a sampled token depends on the request's logits, parameters and seed, never on its neighbours.
"""

import torch
from torch import Tensor

from llava_core.errors import EngineError
from llava_core.types import SamplingParams


def build_generator(params: SamplingParams) -> torch.Generator:
    """The request's source of randomness, on the CPU so that a seed means the same on every device."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """A token id from `logits` (vocab,). Raises EngineError when they are not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise EngineError("the model produced values that are not finite; the features or the weights are damaged")
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = filtered_probabilities(logits.float().cpu(), params)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities (vocab,) after temperature, then top-k, then top-p (nucleus: the smallest set reaching top_p)."""
    ordered, order = (logits / params.temperature).sort(descending=True)
    if params.top_k:
        ordered[params.top_k :] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= params.top_p] = 0.0
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())
