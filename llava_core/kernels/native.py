"""Compiles native.c where it runs and calls it with tensors: a decoder layer's operations other than matrix products.

An operation in torch takes microseconds for dispatch and for allocating its result, which with few tokens is longer
than its computation. Needs a C compiler at run time, as torch.compile and Triton do; without one there are no kernels,
and callers fall back to torch. Knows shapes, and neither models nor requests.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=gnu11"]
# Compilers avoid 512-bit vectors as expensive, which they no longer are.
_FLAGS += ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []
_COMPILE_S = 120
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "add_norm": [_P, _P, _P, _P, _I, _I, _F],
    "rotate": [_P, _P, _P, _P, _I, _I, _I, _I],
    "gate": [_P, _P, _I, _I],
    "store": [_P, _I, _P, _I, _I, _P, _I, _I, _I],
    "attend": [_P, _I, _P, _P, _I, _I, _P, _I, _P, _P, _I, _I, _I, _I, _I, _I, _F],
}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LANES, _MAX_DIM = 16, 256
_NO_WINDOW = 2**62


class NativeKernels:
    """The functions of native.c for one dtype. Tensors have that dtype, are on the CPU, and contiguous unless noted."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        def function(name: str) -> ctypes._NamedFuncPointer:
            found = library[f"{name}_{_NAMES[dtype]}"]
            found.argtypes, found.restype = _ARGUMENTS[name], None
            return found

        self.dtype = dtype
        self._add_norm, self._rotate, self._gate = function("add_norm"), function("rotate"), function("gate")
        self._store, self._attend = function("store"), function("attend")

    def add_norm_(self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """`hidden` (rows, size) += `added`, in place; the result divided by its root mean square, times `weight`."""
        normed = torch.empty_like(hidden)
        rows, size = hidden.shape
        other = None if added is None else added.data_ptr()
        self._add_norm(hidden.data_ptr(), other, weight.data_ptr(), normed.data_ptr(), rows, size, eps)
        return normed

    def rotate_(self, projected: Tensor, num_heads: int, cos: Tensor, signed_sin: Tensor, positions: Tensor) -> None:
        """Rotate the first `num_heads` heads of each row of `projected` (rows, heads, head_dim), in place, by the row's
        position in the text, `positions` int64 (rows,); `cos` and `signed_sin` (positions, 1, head_dim) are those of
        fused.py."""
        rows, all_heads, dim = projected.shape
        # It may be a strided column.
        places = positions.contiguous()
        self._rotate(
            projected.data_ptr(),
            cos.data_ptr(),
            signed_sin.data_ptr(),
            places.data_ptr(),
            rows,
            num_heads,
            all_heads,
            dim,
        )

    def gate(self, both: Tensor) -> Tensor:
        """SiLU of the first half of `both` (rows, 2 * size), times the second: (rows, size)."""
        rows, size = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, size)
        self._gate(both.data_ptr(), out.data_ptr(), rows, size)
        return out

    def store(self, states: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Copy keys or values (rows, heads, head_dim) to `slots` int64 (rows,) of `cache` (slots, heads, head_dim),
        whose slots and heads may have any strides."""
        states = _side_by_side(states)
        rows, heads, dim = states.shape
        self._store(
            states.data_ptr(),
            states.stride(0),
            cache.data_ptr(),
            cache.stride(0),
            cache.stride(1),
            slots.data_ptr(),
            rows,
            heads,
            dim,
        )

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        lengths: Tensor,
        block_size: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Attention of each row of `query` (rows, num_heads, head_dim) to the last `window` of its `lengths` int64
        (rows,) tokens, which are in the blocks `table` int32 (rows, blocks) of `keys` and `values` (slots,
        num_kv_heads, head_dim), which must have equal strides; returns (rows, num_heads, head_dim)."""
        query = _side_by_side(query)
        rows, num_heads, dim = query.shape
        heads = keys.shape[1]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self._attend(
            query.data_ptr(),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            table.data_ptr(),
            table.shape[1],
            lengths.data_ptr(),
            out.data_ptr(),
            rows,
            heads,
            num_heads // heads,
            dim,
            block_size,
            _NO_WINDOW if window is None else window,
            scale,
        )
        return out


def _side_by_side(states: Tensor) -> Tensor:
    """The tensor (rows, heads, head_dim) with each row contiguous; rows may be strided."""
    dim = states.shape[2]
    return states if states.stride(1) == dim and states.stride(2) == 1 else states.contiguous()


def native_kernels(dtype: torch.dtype, device: str = "cpu") -> NativeKernels | None:
    """The kernels, if this machine can compile them and they support `dtype`."""
    return _kernels(dtype) if device == "cpu" and dtype in _NAMES else None


def can_attend(head_dim: int) -> bool:
    """Whether `attend` supports heads of this size."""
    return head_dim % _LANES == 0 and head_dim <= _MAX_DIM


@functools.cache
def _kernels(dtype: torch.dtype) -> NativeKernels | None:
    library = _library()
    return None if library is None else NativeKernels(library, dtype)


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        logger.info("no C compiler (cc, gcc, clang, or the one in CC): generation is slower")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    # RuntimeError: there is no home directory.
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("%s cannot be used, and generation is slower: %s", _SOURCE.name, said)
        return None


def _built(compiler: str) -> Path:
    """The compiled library, cached between starts for this source, these flags and this processor."""
    source = _SOURCE.read_bytes()
    made_of = repr((source, compiler, _FLAGS, platform.machine(), _processor()))
    path = _folder() / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        # Several processes may compile at once: each moves a complete file into place.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
            made.replace(path)
    return path


def _folder() -> Path:
    """The folder of compiled libraries, writable by this user alone, because they are executed."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-serve"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by others; remove it")
    return folder


def _processor() -> str:
    """The processor that -march=native refers to: machines of several kinds may share a home directory."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
