"""Dtypes and shapes of the tensors in a `.bin` file, from its pickle alone: without torch, without reading numbers.

Reads both formats of torch.save: a zip archive with `data.pkl` in it, and the format before torch 1.6, a sequence of
pickles. Resolves only the few names that tensors consist of, so code in a pickle does not run. Knows nothing about
models; tensors.py reads the numbers.
"""

from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from llava_core.checkpoints.access import denied
from llava_core.errors import CheckpointError

# torch's storage classes, with the dtype of their numbers.
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
# Storages of newer dtypes are plain bytes; the dtype is pickled separately under its own name.
_DTYPE = re.compile(r"(u?int|b?float|complex)\d+(_\w+)?")


class PickledTensor(NamedTuple):
    """A tensor as described by its pickle; `dtype` by torch's name."""

    dtype: str
    shape: tuple[int, ...]


class _Storage(NamedTuple):
    """A storage, or a dtype on its own."""

    dtype: str


def read_pickled(file: Path) -> dict[str, PickledTensor]:
    """Every tensor of a `.bin` file by name.

    Raises CheckpointError when the file is missing, damaged, or holds anything but a dictionary of tensors.
    """
    try:
        with file.open("rb") as opened:
            is_zip = opened.read(2) == b"PK"
            opened.seek(0)
            content = _read_zip(opened) if is_zip else _read_old(opened)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete") from None
    except PermissionError:
        raise denied(file) from None
    except _ForeignObjectError as error:
        raise CheckpointError(
            f"{file} holds objects other than tensors, which could be code and are never run ({error}); convert it to "
            "safetensors where you trust it"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is damaged or truncated ({type(error).__name__}); download it again") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, PickledTensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{file} must hold a dictionary of tensors by name, and nothing else")
    return dict(content)


# Exceptions from unpickling where bytes are missing or wrong.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    MemoryError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    ImportError,
)


class _ForeignObjectError(Exception):
    """A pickle asks for something that no tensor needs."""


def _read_zip(file: IO[bytes]) -> object:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        with archive.open(names[0]) as inner:
            return _Unpickler(inner).load()


def _read_old(file: IO[bytes]) -> object:
    # Before the content: a magic number, the format's version, and a description of the machine that wrote it.
    for _ in range(3):
        _Unpickler(file).load()
    return _Unpickler(file).load()


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], *_: object) -> PickledTensor:
    return PickledTensor(storage.dtype, tuple(map(int, size)))


def _rebuild_tensor_v3(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: object, grad: object, hooks: object, dtype: _Storage
) -> PickledTensor:
    return _rebuild_tensor(dtype, offset, size)


def _rebuild_parameter(tensor: PickledTensor, *_: object) -> PickledTensor:
    return tensor


_CALLABLES: dict[tuple[str, str], Callable[..., object]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CALLABLES:
            return _CALLABLES[module, name]
        if module == "torch" and (name in _STORAGES or _DTYPE.fullmatch(name)):
            return _Storage(_STORAGES.get(name, name))
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Storage("bytes")
        raise _ForeignObjectError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """("storage", class, key, location, count): where a tensor's numbers are; only the class is needed."""
        kind, storage = pid[:2]
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a storage of unknown kind")
        return storage
