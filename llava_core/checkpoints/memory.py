"""How much memory a model needs, reckoned from shapes alone, and how much there is.

Knows what is stored in how many bytes; asks torch only for what is free on a GPU. Activations are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil

from llava_core.checkpoints.keymaps import Part
from llava_core.checkpoints.shapes import Shape, decoder_fields
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError
from llava_core.images.geometry import num_image_tokens
from llava_core.types import Quantization, Size

# Beside the picture in the least that a model must have room for: one question and its answer.
_TEXT_TOKENS = 512
_CGROUP = Path("/sys/fs/cgroup")
_SMALLER = "free some, choose a smaller dtype, or quantise to 8bit or 4bit"
_GIB = 2**30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of weights, and of the keys and values of one token; `tokens` is how many there must be room for."""

    weights: int
    per_token: int = 0
    tokens: int = 0

    @property
    def total(self) -> int:
        """Bytes needed before anything can be answered."""
        return self.weights + self.per_token * self.tokens

    def __str__(self) -> str:
        weights = f"{self.weights / _GIB:.2f} GiB of weights"
        if not self.per_token:
            return weights
        return f"{weights} and {self.per_token / 1024:.0f} KiB of cache per token, room for {self.tokens} tokens"


def weight_bytes(
    part: Part, shapes: Mapping[str, Shape], itemsize: int, quantization: Quantization | None = None
) -> int:
    """Bytes of a part's tensors, by name, at `itemsize` bytes a number; `quantization` applies where it is applied.

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
    """Keys and values of one token in every layer."""
    text = decoder_fields(config)
    return int(2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * itemsize)


def language_need(config: ModelConfig, weights: int, itemsize: int) -> MemoryNeed:
    """What weights of so many bytes need to answer one question about one square picture."""
    image_tokens = num_image_tokens(config, Size(config.tile_size, config.tile_size))
    tokens = min(config.context_length, image_tokens + _TEXT_TOKENS)
    return MemoryNeed(weights, cache_bytes_per_token(config, itemsize), tokens)


def check_fits(need: MemoryNeed, device: str, what: str, *, advice: str = _SMALLER) -> None:
    """Raise CheckpointError, before anything is loaded, where `device` has no room for `what`.

    Nothing is reserved. Processes that start on one machine at the same time all see the same bytes free, may all pass
    and then run out together. A lock would make each wait for all of another's loading and still be no cure, since
    caches grow only when questions come: how many replicas a machine takes is for whoever places them to say.
    """
    available = available_bytes(device)
    if need.total > available:
        raise CheckpointError(
            f"{what} needs {need.total / _GIB:.2f} GiB on {device} ({need}), and {available / _GIB:.2f} GiB are free; "
            f"{advice}"
        )


def available_bytes(device: str) -> int:
    """What is free on a GPU; on the CPU what the machine, or the container this process is in, has left."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _left_in_container())


def _left_in_container() -> int:
    """cgroup v2's limit less what is used and cannot be dropped; all there is where there is no limit.

    What can be dropped is the pages on the lists of files. `file` counts shared memory as well, Ray's object store
    among it, which only goes when its owner goes.
    """
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return psutil.virtual_memory().total
    if limit == "max":
        return psutil.virtual_memory().total
    return int(limit) - used + int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
