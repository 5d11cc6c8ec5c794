"""Dtype and shape of every tensor in a weight file, from its header alone. Reads no weights and executes no code.

Needs no torch. Knows nothing about models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llava_core.checkpoints.pickles import read_pickled
from llava_core.checkpoints.safetensors_file import open_safetensors
from llava_core.errors import CheckpointError

# safetensors' dtype names, with torch's names and bytes per number.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as stored: `dtype` by safetensors' name, `shape` in numbers."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether its numbers are of a floating-point type."""
        return "float" in DTYPES[self.dtype][0]

    @property
    def num_bytes(self) -> int:
        """Its size on disk."""
        return self.num_elements * DTYPES[self.dtype][1]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """A weight file's tensors. Raises CheckpointError when it is missing, damaged, or has an unknown dtype."""
    found = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickled(file)
    unknown = sorted({info.dtype for info in found.values()} - set(DTYPES))
    if unknown:
        raise CheckpointError(f"{file} holds numbers of type {unknown[0]}; known are {', '.join(DTYPES)}")
    return found


def _read_safetensors(file: Path) -> dict[str, TensorInfo]:
    with open_safetensors(file, "np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _read_pickled(file: Path) -> dict[str, TensorInfo]:
    names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
    return {
        name: TensorInfo(names.get(tensor.dtype, tensor.dtype), tensor.shape)
        for name, tensor in read_pickled(file).items()
    }
