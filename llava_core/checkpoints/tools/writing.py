"""Writes new checkpoint folders atomically, never over an existing one; weights one tensor at a time.

The safetensors format is written here, because the library needs a whole file in memory first: eight bytes with the
header's length, the header as JSON, then the tensors. Knows no layouts.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from llava_core.checkpoints.contents import Stored
from llava_core.checkpoints.files import read_json
from llava_core.checkpoints.headers import DTYPES, TensorInfo
from llava_core.checkpoints.tensors import TensorReader
from llava_core.config import JsonObject
from llava_core.disk import flush
from llava_core.errors import CheckpointError

# In a converted checkpoint: the original's files with settings that the new layout cannot express.
ORIGINAL_FOLDER = "original"
DEFAULT_SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Planned:
    """A tensor to be written under `name`; `make` reads or computes it when it is written."""

    name: str
    info: TensorInfo
    make: Callable[[], Tensor]


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which gets its final name when the block ends and is removed when the block fails.

    Raises CheckpointError when `folder` exists, or cannot be written. An OSError in the block counts as a write error,
    so the block must read files with functions that raise something else. If a folder of the same name is created
    meanwhile, it is replaced if empty; otherwise it stays and this one is removed.
    """
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder} exists and is not overwritten; choose another folder or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error}") from error
    try:
        yield partial
        # Temporary folders are private to their owner; this one gets the user's usual permissions.
        partial.chmod(0o777 & ~_umask())
        for path in partial.rglob("*"):
            if path.is_file():
                flush(path)
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error
    finally:
        # After the rename, there is nothing left to remove.
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_model(
    folder: Path, tensors: Sequence[Planned], *, max_shard_size: int = DEFAULT_SHARD_SIZE, stem: str = "model"
) -> None:
    """Write safetensors in the given order, in files of at most `max_shard_size` bytes, or one larger tensor each.

    Holds one tensor in memory at a time; shows its progress on a terminal.
    """
    shards = _split(tensors, max_shard_size)
    total = sum(planned.info.num_bytes for planned in tensors)
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name.partition(".partial-")[0], disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
            _write_safetensors(folder / name, shard, bar.update)
            weight_map |= dict.fromkeys((planned.name for planned in shard), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def _split(tensors: Sequence[Planned], max_shard_size: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in tensors:
        if shards[-1] and size + planned.info.num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.info.num_bytes
    return shards


def _write_safetensors(file: Path, tensors: Sequence[Planned], report: Callable[[int], object]) -> None:
    # Wide numbers first, so that each begins at a multiple of its own size, which readers may rely on.
    ordered = sorted(tensors, key=lambda planned: -DTYPES[planned.info.dtype][1])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in ordered:
        begin, end = end, end + planned.info.num_bytes
        header[planned.name] = {
            "dtype": planned.info.dtype,
            "shape": list(planned.info.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("xb") as out:
        out.write(len(encoded).to_bytes(8, "little"))
        out.write(encoded)
        for planned in ordered:
            out.write(_bytes(planned))
            report(planned.info.num_bytes)


def _bytes(planned: Planned) -> memoryview:
    tensor = planned.make()
    expected = (DTYPES[planned.info.dtype][0], planned.info.shape)
    made = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    assert made == expected, f"{planned.name} was planned as {expected} and came as {made}"
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_json(path: Path, content: JsonObject) -> None:
    """Write JSON in the style of configuration files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those of the named files that exist. Raises CheckpointError when one cannot be read."""
    for name in names:
        if (source / name).exists():
            with (target / name).open("wb") as out:
                out.writelines(_pieces(source / name))


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder's contents into a new one. Raises CheckpointError when something cannot be read."""
    for path, _, names in os.walk(source, onerror=_cannot_be_read, followlinks=True):
        folder = target / Path(path).relative_to(source)
        folder.mkdir()
        copy_files(Path(path), folder, names)


def _pieces(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as opened:
            while piece := opened.read(2**24):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _cannot_be_read(error: OSError) -> NoReturn:
    raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error


# The settings that transformers refuses to save while `do_sample` is false.
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def clean_generation_config(config: Mapping[str, object]) -> dict[str, object]:
    """Drop sampling settings that have no effect with `do_sample: false`: transformers would refuse to save them."""
    if config.get("do_sample"):
        return dict(config)
    return {name: value for name, value in config.items() if name not in _SAMPLING_FIELDS}


def as_stored(name: str, stored: Stored, reader: TensorReader) -> Planned:
    """Plan a tensor of another checkpoint, bit for bit, or rounded to float16 with `is_rounded`."""
    if not stored.is_rounded:
        return Planned(name, stored.info, lambda: reader.read(stored.file, stored.name))
    rounded = TensorInfo("F16", stored.info.shape)
    return Planned(name, rounded, lambda: reader.read(stored.file, stored.name).half())


# A tokenizer's files, as named by any version.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_settings(source: Path, target: Path) -> None:
    """Copy everything but the weights of a whole checkpoint: settings, tokenizer, templates."""
    files = [file for pattern in ("*.json", "*.jinja", "*.model") for file in sorted(source.glob(pattern))]
    copy_files(source, target, [file.name for file in files if not file.name.endswith(".index.json")])
    if (source / ORIGINAL_FOLDER).is_dir():
        copy_folder(source / ORIGINAL_FOLDER, target / ORIGINAL_FOLDER)
    _clean_generation_config(target)


def copy_text_files(source: Path, target: Path) -> None:
    """Copy a decoder's tokenizer and its cleaned generation_config.json."""
    copy_files(source, target, [*TOKENIZER_FILES, "generation_config.json"])
    _clean_generation_config(target)


def _clean_generation_config(folder: Path) -> None:
    name = "generation_config.json"
    if (folder / name).exists():
        write_json(folder / name, clean_generation_config(read_json(folder, name)))
