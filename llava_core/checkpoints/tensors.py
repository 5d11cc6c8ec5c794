"""Reads tensors from weight files: safetensors memory-mapped, `.bin` only by weights-only unpickling.

Knows file formats and their possible defects; nothing about models or names.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_core.checkpoints.pickles import read_pickled
from llava_core.checkpoints.safetensors_file import open_safetensors
from llava_core.errors import CheckpointError

# How many tensors of one file are mapped at a time during conversion: about one decoder layer.
_PIECE = 9


def read_tensors(files: Mapping[str, Path], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read the named tensors of several files, memory-mapped; floats of another dtype are converted to `dtype`.

    Raises CheckpointError for damage, code, or a name that its file does not hold.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, file in files.items():
        by_file[file].append(name)
    loaded: dict[str, Tensor] = {}
    for file, names in by_file.items():
        read = _read_safetensors if file.suffix == ".safetensors" else _read_bin
        for some in _in_pieces(names) if dtype else [names]:
            # Converted tensors' pages are not needed again: reading in pieces releases each piece's pages.
            loaded.update({name: _converted(tensor, dtype) for name, tensor in read(file, some).items()})
    return loaded


def _in_pieces(names: list[str]) -> Iterator[list[str]]:
    return (names[first : first + _PIECE] for first in range(0, len(names), _PIECE))


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


class TensorReader:
    """Reads one tensor at a time. Keeps the last `.bin` file, which must be unpickled to find anything in it."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._content: dict[str, Tensor] = {}

    def read(self, file: Path, name: str) -> Tensor:
        """The tensor of this name, memory-mapped where the format allows it. Raises CheckpointError as above."""
        if file.suffix == ".safetensors":
            return _read_safetensors(file, [name])[name]
        if file != self._file:
            self._file, self._content = file, read_bin(file)
        if name not in self._content:
            raise CheckpointError(f"{file} does not hold {name}, which the index says it does; download it again")
        return self._content[name]


def _read_safetensors(file: Path, names: list[str]) -> dict[str, Tensor]:
    with open_safetensors(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names}


def _read_bin(file: Path, names: list[str]) -> dict[str, Tensor]:
    tensors = read_bin(file)
    missing = sorted(set(names) - set(tensors))
    if missing:
        raise CheckpointError(f"{file} does not hold {missing[0]}, which the index says it does; download it again")
    return {name: tensors[name] for name in names}


def read_bin(file: Path) -> dict[str, Tensor]:
    """Every tensor of a `.bin` file, memory-mapped where its format allows it. Raises CheckpointError as above."""
    names = read_pickled(file)
    try:
        content = _unpickle(file)
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is damaged or truncated ({type(error).__name__}); download it again") from error
    return {name: content[name] for name in names}


# Exceptions from torch where the pickle can be read but the numbers after it cannot.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    KeyError,
    AttributeError,
    TypeError,
    IndexError,
)


def _unpickle(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        is_zip = opened.read(2) == b"PK"
    # The format before torch 1.6 is not a zip archive and cannot be mapped.
    content: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    return content
