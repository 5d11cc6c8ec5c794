"""What no server can beat on this machine: arithmetic and bytes from a checkpoint's shapes, over measured rates.

A floor counts only what cannot be left out: matrix products and attention for a prompt's first token, each weight and
each cached key and value read once from memory for a further one. So it holds for models that no cache of the processor
holds. Knows nothing about servers.
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
# The product whose rate stands for all: the tower's tokens through the first half of its MLP.
ROWS, INNER, OUTER = 577, 1024, 4096
READ_BYTES = 256 * 2**20
_REPEATS = 8


@dataclass(frozen=True)
class Rates:
    """Of this machine with all its cores: bfloat16 matrix products and plain reading."""

    flop_per_s: float
    bytes_per_s: float


def measure_rates() -> Rates:
    """The best of a few tries: what the machine can do when nothing else disturbs it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        rows = torch.randn(ROWS, INNER).bfloat16()
        layer = torch.nn.Sequential(torch.nn.Linear(INNER, OUTER, bias=False, dtype=torch.bfloat16))
        # Packed where the processor has kernels for it: a slower product would be no floor.
        pack_linears(layer)
        numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        with torch.inference_mode():
            product_s, read_s = _best(lambda: layer(rows)), _best(numbers.sum)
    finally:
        torch.set_num_threads(threads)
    return Rates(2 * ROWS * INNER * OUTER / product_s, READ_BYTES / read_s)


def floor(shape: Shape, rates: Rates, *, clients: int, prompt_tokens: int, tokens: int, has_seen: bool) -> Figures:
    """The least milliseconds to the first token and for each further one, the most tokens per second of all clients.

    With `has_seen` the picture is one whose keys and values are known: only the question is new.
    """
    new = prompt_tokens - (shape.image_tokens if has_seen else 0)
    encoding = 0 if has_seen else encode_flop(shape)
    first_s = (encoding + prefill_flop(shape, new, prompt_tokens)) / rates.flop_per_s
    context = prompt_tokens + tokens / 2
    step_s = (weight_bytes(shape) + clients * cache_bytes(shape.text, context)) / rates.bytes_per_s
    # While a picture is encoded or a prompt read, the same cores write no tokens.
    seconds = first_s + (tokens - 1) * step_s / clients
    return {
        "first_ms_p50": round(first_s * 1e3, 2),
        "token_ms_p50": round(step_s * 1e3, 2),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def encode_flop(shape: Shape) -> float:
    """The tower up to the layer before its last, whose output is what LLaVA reads, and the projector."""
    tokens, hidden = shape.image_tokens + 1, shape.vision.hidden
    patches = 2 * shape.image_tokens * 3 * shape.patch**2 * hidden
    # CLIP's MLP has two matrices.
    layer = 2 * tokens * (_attention_parameters(shape.vision) + 2 * hidden * shape.vision.mlp)
    attention = 4 * tokens * tokens * hidden
    projector = 2 * shape.image_tokens * (hidden + shape.text.hidden) * shape.text.hidden
    return patches + (shape.vision.layers - 1) * (layer + attention) + projector


def prefill_flop(shape: Shape, new: int, context: int) -> float:
    """`new` tokens at the end of a context of so many, and the next token's logits once."""
    seen = new * (context - new) + new * (new + 1) / 2
    attention = 4 * seen * shape.text.hidden
    layers = shape.text.layers * (2 * new * decoder_layer_parameters(shape.text) + attention)
    return layers + 2 * shape.text.hidden * shape.vocabulary


def weight_bytes(shape: Shape) -> float:
    """What a step reads whatever it computes: the decoder's layers and its output matrix."""
    parameters = shape.text.layers * decoder_layer_parameters(shape.text) + shape.text.hidden * shape.vocabulary
    return BYTES * parameters


def cache_bytes(text: Network, context: float) -> float:
    return BYTES * text.layers * 2 * text.hidden * text.kv_heads / text.heads * context


def decoder_layer_parameters(text: Network) -> float:
    # Llama's MLP has three matrices.
    return _attention_parameters(text) + 3 * text.hidden * text.mlp


def _attention_parameters(network: Network) -> float:
    """Queries and output, keys and values."""
    return 2 * network.hidden**2 * (1 + network.kv_heads / network.heads)


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
