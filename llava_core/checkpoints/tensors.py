"""Tensors out of weight files: safetensors memory-mapped, `.bin` through weights-only unpickling and never otherwise.

Knows formats and what can be wrong with them; nothing about models or names.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llava_core.checkpoints.safetensors_file import open_safetensors
from llava_core.errors import CheckpointError

# Tensors of one file that are mapped at a time when they are converted: about a decoder's layer.
_PIECE = 9


def read_tensors(files: Mapping[str, Path], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The named tensors of several files, memory-mapped; floats that are not of `dtype` are converted to it.

    Raises CheckpointError for damage, code, or a name its file does not hold.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, file in files.items():
        by_file[file].append(name)
    loaded: dict[str, Tensor] = {}
    for file, names in by_file.items():
        read = _read_safetensors if file.suffix == ".safetensors" else _read_bin
        for some in _in_pieces(names) if dtype else [names]:
            # What is converted was read for nothing else: reading in pieces lets go of each piece's pages.
            loaded.update({name: _converted(tensor, dtype) for name, tensor in read(file, some).items()})
    return loaded


def _in_pieces(names: list[str]) -> Iterator[list[str]]:
    return (names[first : first + _PIECE] for first in range(0, len(names), _PIECE))


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


class TensorReader:
    """One tensor after another. The last `.bin` file stays open, since it must be unpickled to find anything in it."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._content: dict[str, Tensor] = {}

    def read(self, file: Path, name: str) -> Tensor:
        """The tensor of this name, memory-mapped where the format allows it. Raises CheckpointError as above."""
        if file.suffix != ".bin":
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
    """Every tensor of a `.bin` file, memory-mapped where its format allows it.

    Raises CheckpointError when the file is missing, damaged, or holds anything but a dictionary of tensors.
    """
    try:
        content = _unpickle(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{file} is damaged, or holds objects other than tensors, which could be code and are never run "
            f"({reason}); download it again or convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({type(error).__name__}); download it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} must hold a dictionary of tensors by name, and nothing else")
    return {str(name): value for name, value in content.items()}


def _unpickle(file: Path) -> object:
    with file.open("rb") as opened:
        is_zip = opened.read(2) == b"PK"
    # The format before torch 1.6 is no zip archive and cannot be mapped.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
