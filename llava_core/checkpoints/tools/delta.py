"""Delta weights: a model as its differences to a base, for a base that may not be passed on; made, and applied again.

As in the original code: tensors of both are subtracted or added, what the base does not have (projector, newline,
tower) is copied, and where embeddings or head have other numbers of rows the rows of both count. The base is rounded
to the dtype of the model or delta first, and so is the result; a delta applied again gives the model back up to that
rounding. One tensor at a time. A delta made here says what its base was, by name and by a digest of its numbers, and is
applied to no other. Knows nothing about what the weights mean.
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

# In config.json beside the base's name, which may be that of a folder and so of many models.
DIGEST_FIELD = "delta_base_sha256"
# Numbers of each tensor that count for it. Training changes some of them in one tensor or another.
_SAMPLE = 1024
Sign = Literal[1, -1]
# Every tensor of the model or delta with the base's that is subtracted or added; None where it is copied.
Pairs = Sequence[tuple[Stored, Stored | None]]


def make_delta(
    base: str, target: str, out: Path, *, offline: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE
) -> None:
    """Write `target` minus `base`, with the target's tokenizer. config.json names the base, so nobody asks a delta.

    Raises CheckpointError when `out` exists, or when the two are not of one architecture.
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

    Raises CheckpointError as above, and for a folder that does not say that it is a delta, or is one of another base.
    With `force` it does not: the original code's deltas say nothing.
    """
    hub = Hub(offline=offline)
    below, folder = _model_folder(base, "the base", hub), hub.find(delta, "the delta")
    settings = read_json(folder, "config.json")
    if DELTA_FIELD not in settings and not force:
        raise CheckpointError(
            f"{folder / 'config.json'} has no {DELTA_FIELD}, so this is no delta, or one that the original code made; "
            "where it is one, apply it with --force"
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
    """A hub id as it is; of a folder its own name alone, since the way to it is this machine's."""
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
    """Of the beginning of each of the base's tensors, rounded as it is before it is subtracted or added.

    So files, shards and dtypes that come to the same numbers have the same digest.
    """
    reader = TensorReader()
    parts = []
    # File by file, which spares a `.bin` file being opened again for each tensor.
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
    """The tensor plus or minus the base's; rows that only one of them has stay as they are, or are left out."""
    own, other = planned.make(), reader.read(base.file, base.name)
    exact = torch.promote_types(own.dtype, torch.float32)
    result = own.to(exact, copy=True)
    shared = result
    if own.shape != other.shape:
        rows = min(len(own), len(other))
        shared, other = result[:rows], other[:rows]
    # In place, for the largest tensor is a gigabyte and more.
    shared.add_(other.to(own.dtype).to(exact), alpha=sign)
    return result.to(own.dtype)
