"""Delta weights: makes and applies a model's differences to a base, for a base that may not be redistributed.

As in the original code: common tensors are subtracted or added, tensors that the base lacks (projector, newline, tower)
are copied, and where embeddings or head differ in rows, only the common rows are combined. The base is first rounded to
the dtype of the model or delta, and so is the result; applying a delta restores the model up to that rounding. One
tensor at a time. A delta made here records its base by name and by a digest of its numbers, and is applied to no other.
Knows nothing about the meaning of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llava_core.checkpoints.contents import Stored, stored_tensors
from llava_core.checkpoints.files import read_json
from llava_core.checkpoints.headers import DTYPES
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.keymaps import VOCABULARY_KEYS, Key
from llava_core.checkpoints.layout import DELTA_FIELD
from llava_core.checkpoints.tensors import TensorReader
from llava_core.checkpoints.tools.writing import (
    DEFAULT_SHARD_SIZE,
    Planned,
    as_stored,
    copy_settings,
    new_folder,
    write_json,
    write_model,
)
from llava_core.checkpoints.weights import find_weights, first
from llava_core.errors import CheckpointError

# In config.json next to the base's name, which may be that of a folder and thus ambiguous.
DIGEST_FIELD = "delta_base_sha256"
# How many numbers of each tensor enter the digest. Training changes some of them in one tensor or another.
_SAMPLE = 1024
Sign = Literal[1, -1]
# Every tensor of the model or delta, with the base's tensor to subtract or add; None where it is copied.
Pairs = Sequence[tuple[Stored, Stored | None]]


def make_delta(
    base: str, target: str, out: Path, *, offline: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE
) -> None:
    """Write `target` minus `base`, with the target's tokenizer. config.json names the base, so that no delta is
    mistaken for a model.

    Raises CheckpointError when `out` exists, or when the two differ in architecture.
    """
    hub = Hub(offline=offline)
    folder, below = _model_folder(target, "the target", hub), _model_folder(base, "the base", hub)
    pairs = _pair(folder, below)
    _write(folder, out, pairs, -1, {DELTA_FIELD: _name(base), DIGEST_FIELD: _digest(pairs)}, max_shard_size)


def apply_delta(
    base: str,
    delta: str,
    out: Path,
    *,
    force: bool = False,
    offline: bool = False,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
) -> None:
    """Write `base` plus `delta`, with the delta's tokenizer.

    Raises CheckpointError as above, and for a folder that is not marked as a delta, or is a delta of another base.
    `force` skips these two checks: the original code's deltas have no marks.
    """
    hub = Hub(offline=offline)
    below, folder = _model_folder(base, "the base", hub), hub.find(delta, "the delta")
    settings = read_json(folder, "config.json")
    if DELTA_FIELD not in settings and not force:
        raise CheckpointError(
            f"{folder / 'config.json'} has no {DELTA_FIELD}, so this is not a delta, or one made by the original code; "
            "if it is a delta, apply it with --force"
        )
    pairs = _pair(folder, below)
    if not force and settings.get(DIGEST_FIELD) != _digest(pairs):
        raise CheckpointError(
            f"{below} is not the base of {folder}, which was made from {settings[DELTA_FIELD]} with other numbers "
            f"({DIGEST_FIELD} in its config.json); name that one, or apply it with --force"
        )
    _write(folder, out, pairs, 1, {}, max_shard_size)


def _model_folder(path_or_id: str, role: str, hub: Hub) -> Path:
    folder = hub.find(path_or_id, role)
    if DELTA_FIELD in read_json(folder, "config.json"):
        raise CheckpointError(f"{folder} is a delta, where a model is wanted; apply it to its base first")
    return folder


def _name(base: str) -> str:
    """A hub id unchanged; for a folder only its last part, since its full path is specific to this machine."""
    path = Path(os.path.expanduser(base))
    return path.resolve().name if path.is_dir() else base


def _pair(folder: Path, base: Path) -> Pairs:
    own, theirs = _stored(folder), _stored(base)
    lacking = sorted(key.name for key in set(theirs) - set(own))
    if lacking:
        raise CheckpointError(f"{base} is the wrong base for {folder}, which does not hold: {first(lacking)}")
    if not set(theirs) & set(own):
        raise CheckpointError(f"{base} and {folder} have no tensor in common")
    pairs: list[tuple[Stored, Stored | None]] = []
    for key, stored in own.items():
        other = theirs.get(key) if stored.info.dtype.startswith(("F", "BF")) else None
        if other is not None:
            _check_shapes(key, stored, other)
        pairs.append((stored, other))
    return pairs


def _stored(folder: Path) -> dict[Key, Stored]:
    weights = find_weights(folder)
    # Raises for tensors of unknown purpose.
    weights.keys()
    return stored_tensors([weights])


def _check_shapes(key: Key, own: Stored, theirs: Stored) -> None:
    ours, other = own.info.shape, theirs.info.shape
    if ours != other and (key not in VOCABULARY_KEYS or ours[1:] != other[1:]):
        raise CheckpointError(
            f"{theirs.file}: {theirs.name} has shape {other}, but {own.name} in {own.file} has {ours}; "
            "it is the wrong base"
        )


def _digest(pairs: Pairs) -> str:
    """A digest of the beginning of each of the base's tensors, rounded as for subtracting or adding it.

    So files, shards and dtypes that yield the same numbers have the same digest.
    """
    reader = TensorReader()
    parts = []
    # File by file, which avoids reopening a `.bin` file for each tensor.
    for own, base in sorted(((own, base) for own, base in pairs if base), key=lambda pair: pair[1].file):
        dtype: torch.dtype = getattr(torch, DTYPES[own.info.dtype][0])
        numbers = reader.read(base.file, base.name).reshape(-1)[:_SAMPLE].to(dtype)
        parts.append(f"{own.name} {sha256(numbers.view(torch.uint8).numpy().tobytes()).hexdigest()}\n")
    return sha256("".join(sorted(parts)).encode()).hexdigest()


def _write(folder: Path, out: Path, pairs: Pairs, sign: Sign, fields: dict[str, str], max_shard_size: int) -> None:
    reader, below = TensorReader(), TensorReader()
    tensors = []
    for own, base in pairs:
        planned = as_stored(own.name, own, reader)
        if base is not None:
            planned = replace(planned, make=partial(_combined, planned, base, below, sign))
        tensors.append(planned)
    settings = read_json(folder, "config.json")
    kept = {name: value for name, value in settings.items() if name not in (DELTA_FIELD, DIGEST_FIELD)}
    with new_folder(out) as new:
        copy_settings(folder, new)
        write_json(new / "config.json", {**kept, **fields})
        write_model(new, tensors, max_shard_size=max_shard_size)


def _combined(planned: Planned, base: Stored, reader: TensorReader, sign: Sign) -> Tensor:
    """The tensor plus or minus the base's; rows only the tensor has are unchanged, extra rows of the base unused."""
    own, other = planned.make(), reader.read(base.file, base.name)
    exact = torch.promote_types(own.dtype, torch.float32)
    result = own.to(exact, copy=True)
    shared = result
    if own.shape != other.shape:
        rows = min(len(own), len(other))
        shared, other = result[:rows], other[:rows]
    # In place, because the largest tensor is a gigabyte or more.
    shared.add_(other.to(own.dtype).to(exact), alpha=sign)
    return result.to(own.dtype)
