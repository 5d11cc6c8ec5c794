"""How much memory a model needs, computed from shapes alone, and whether that much is free.

Knows the size of each stored number. Activations are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from llava_core.checkpoints.keymaps import Part
from llava_core.checkpoints.shapes import Shape, decoder_fields
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError
from llava_core.images.geometry import num_image_tokens
from llava_core.memory import available_bytes
from llava_core.types import Quantization, Size

# A model needs at least room for one picture and this many tokens: one question and its answer.
_TEXT_TOKENS = 512
_SMALLER = "free some, choose a smaller dtype, or quantise to 8bit or 4bit"
_GIB = 2**30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of weights, and of one token's keys and values; `tokens` is how many tokens must fit."""

    weights: int
    per_token: int = 0
    tokens: int = 0

    @property
    def total(self) -> int:
        """Bytes needed to answer anything at all."""
        return self.weights + self.per_token * self.tokens

    def __str__(self) -> str:
        weights = f"{self.weights / _GIB:.2f} GiB of weights"
        if not self.per_token:
            return weights
        return f"{weights} and {self.per_token / 1024:.0f} KiB of cache per token, room for {self.tokens} tokens"


def weight_bytes(
    part: Part, shapes: Mapping[str, Shape], itemsize: int, quantization: Quantization | None = None
) -> int:
    """Bytes of a part's tensors at `itemsize` bytes per number; `quantization` affects the decoder's matrices only.

    A quantised matrix has a float32 scale for each row (8 bits) or for each block of 64 numbers (4 bits).
    """
    return sum(
        _quantised_bytes(shape, quantization)
        if quantization and part == "decoder" and len(shape) == 2 and ".layers." in name
        else prod(shape) * itemsize
        for name, shape in shapes.items()
    )


def _quantised_bytes(shape: Shape, quantization: Quantization) -> int:
    count = prod(shape)
    return count + 4 * shape[0] if quantization == "8bit" else -(-count // 2) + 4 * -(-count // 64)


def cache_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = decoder_fields(config)
    return int(2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * itemsize)


def language_need(config: ModelConfig, weights: int, itemsize: int) -> MemoryNeed:
    """The memory needed to answer one question about one square picture, with `weights` bytes of weights."""
    image_tokens = num_image_tokens(config, Size(config.tile_size, config.tile_size))
    tokens = min(config.context_length, image_tokens + _TEXT_TOKENS)
    return MemoryNeed(weights, cache_bytes_per_token(config, itemsize), tokens)


def check_fits(need: MemoryNeed, device: str, what: str, *, advice: str = _SMALLER) -> None:
    """Raise CheckpointError, before anything is loaded, where `device` has no room for `what`.

    Nothing is reserved. Processes that start on one machine at the same time all see the same free memory, may all pass
    and then run out together. A lock would make each wait while another loads, and would still not help, since caches
    grow only as questions arrive: whoever places replicas must decide how many fit on a machine.
    """
    available = available_bytes(device)
    if need.total > available:
        raise CheckpointError(
            f"{what} needs {need.total / _GIB:.2f} GiB on {device} ({need}), "
            f"but only {available / _GIB:.2f} GiB are free; {advice}"
        )
