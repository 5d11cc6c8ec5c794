"""What no server can beat on this machine: arithmetic and bytes from a checkpoint's shapes, over measured rates.

A floor counts only unavoidable work: matrix products and attention for the first token; for each further one, reading
each weight and each cached key and value once from memory. So it is valid for models too large for the processor's
caches. Knows nothing about servers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.peers.checkpoints import Network, Shape
from benchmarks.peers.load import Figures
from llava_core.kernels.packed import pack_linears

BYTES = 2  # of a bfloat16
# The product whose rate represents all: the tower's tokens through the first matrix of its MLP.
ROWS, INNER, OUTER = 577, 1024, 4096
READ_BYTES = 256 * 2**20
_REPEATS = 8


@dataclass(frozen=True)
class Rates:
    """This machine's rates with all cores: bfloat16 matrix products and plain memory reads."""

    flop_per_s: float
    bytes_per_s: float


def measure_rates() -> Rates:
    """Measure the best of a few tries: what the machine can do undisturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        rows = torch.randn(ROWS, INNER).bfloat16()
        layer = torch.nn.Sequential(torch.nn.Linear(INNER, OUTER, bias=False, dtype=torch.bfloat16))
        # Packed where the processor has kernels for it: a slower product would not give a floor.
        pack_linears(layer)
        numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        with torch.inference_mode():
            product_s, read_s = _best(lambda: layer(rows)), _best(numbers.sum)
    finally:
        torch.set_num_threads(threads)
    return Rates(2 * ROWS * INNER * OUTER / product_s, READ_BYTES / read_s)


def floor(shape: Shape, rates: Rates, *, clients: int, prompt_tokens: int, tokens: int, has_seen: bool) -> Figures:
    """Return the least milliseconds to the first token and per further token, and the most tokens per second of all
    clients together.

    With `has_seen` the picture's keys and values are cached: only the question is new.
    """
    new = prompt_tokens - (shape.image_tokens if has_seen else 0)
    encoding = 0 if has_seen else encode_flop(shape)
    first_s = (encoding + prefill_flop(shape, new, prompt_tokens)) / rates.flop_per_s
    context = prompt_tokens + tokens / 2
    step_s = (weight_bytes(shape) + clients * cache_bytes(shape.text, context)) / rates.bytes_per_s
    # While they encode a picture or prefill a prompt, the same cores decode no tokens.
    seconds = first_s + (tokens - 1) * step_s / clients
    return {
        "first_ms_p50": round(first_s * 1e3, 2),
        "token_ms_p50": round(step_s * 1e3, 2),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def encode_flop(shape: Shape) -> float:
    """Count the tower up to its second-last layer, whose output LLaVA uses, and the projector."""
    tokens, hidden = shape.image_tokens + 1, shape.vision.hidden
    patches = 2 * shape.image_tokens * 3 * shape.patch**2 * hidden
    # CLIP's MLP has two matrices.
    layer = 2 * tokens * (_attention_parameters(shape.vision) + 2 * hidden * shape.vision.mlp)
    attention = 4 * tokens * tokens * hidden
    projector = 2 * shape.image_tokens * (hidden + shape.text.hidden) * shape.text.hidden
    return patches + (shape.vision.layers - 1) * (layer + attention) + projector


def prefill_flop(shape: Shape, new: int, context: int) -> float:
    """Count `new` tokens at the end of a context of `context` tokens, and the next token's logits once."""
    seen = new * (context - new) + new * (new + 1) / 2
    attention = 4 * seen * shape.text.hidden
    layers = shape.text.layers * (2 * new * decoder_layer_parameters(shape.text) + attention)
    return layers + 2 * shape.text.hidden * shape.vocabulary


def weight_bytes(shape: Shape) -> float:
    """Count what every step reads: the decoder's layers and its output matrix."""
    parameters = shape.text.layers * decoder_layer_parameters(shape.text) + shape.text.hidden * shape.vocabulary
    return BYTES * parameters


def cache_bytes(text: Network, context: float) -> float:
    return BYTES * text.layers * 2 * text.hidden * text.kv_heads / text.heads * context


def decoder_layer_parameters(text: Network) -> float:
    # Llama's MLP has three matrices.
    return _attention_parameters(text) + 3 * text.hidden * text.mlp


def _attention_parameters(network: Network) -> float:
    """Count the projections of queries and output, keys and values."""
    return 2 * network.hidden**2 * (1 + network.kv_heads / network.heads)


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
