"""Delta weights: a model as its differences to a base, for a base that may not be passed on; made, and applied again.

As in the original code: tensors of both are subtracted or added, what the base does not have (projector, newline,
tower) is copied, and where embeddings or head have other numbers of rows the rows of both count. The base is rounded
to the dtype of the model or delta first, and so is the result; a delta applied again gives the model back up to that
rounding. One tensor at a time. Knows nothing about what the weights mean.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llava_core.checkpoints.contents import Stored, stored_tensors
from llava_core.checkpoints.files import read_json
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.keymaps import VOCABULARY_KEYS, Key
from llava_core.checkpoints.layout import DELTA_FIELD, find_weights, first
from llava_core.checkpoints.tensors import TensorReader
from llava_core.checkpoints.writing import (
    DEFAULT_SHARD_SIZE,
    Planned,
    as_stored,
    copy_settings,
    new_folder,
    write_json,
    write_model,
)
from llava_core.errors import CheckpointError

Sign = Literal[1, -1]


def make_delta(
    base: str, target: str, out: Path, *, offline: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE
) -> None:
    """Write `target` minus `base`, with the target's tokenizer. config.json names the base, so nobody asks a delta.

    Raises CheckpointError when `out` exists, or when the two are not of one architecture.
    """
    hub = Hub(offline=offline)
    folder = hub.find(target, "the target")
    if DELTA_FIELD in read_json(folder, "config.json"):
        raise CheckpointError(f"{folder} is a delta already; make one of the model that it was applied to")
    _write(folder, hub.find(base, "the base"), out, -1, {DELTA_FIELD: base}, max_shard_size)


def apply_delta(
    base: str, delta: str, out: Path, *, offline: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE
) -> None:
    """Write `base` plus `delta`, with the delta's tokenizer.

    A delta of the original code looks like a model, so whether it is one cannot be checked. Raises CheckpointError as
    above.
    """
    hub = Hub(offline=offline)
    folder = hub.find(delta, "the delta")
    _write(folder, hub.find(base, "the base"), out, 1, {}, max_shard_size)


def _write(folder: Path, base: Path, out: Path, sign: Sign, marker: dict[str, str], max_shard_size: int) -> None:
    tensors = _plan(folder, base, sign)
    with new_folder(out) as new:
        copy_settings(folder, new)
        settings = read_json(folder, "config.json")
        settings.pop(DELTA_FIELD, None)
        write_json(new / "config.json", {**settings, **marker})
        write_model(new, tensors, max_shard_size=max_shard_size)


def _plan(folder: Path, base: Path, sign: Sign) -> list[Planned]:
    own, theirs = _stored(folder), _stored(base)
    lacking = sorted(key.name for key in set(theirs) - set(own))
    if lacking:
        raise CheckpointError(f"{base} is the wrong base for {folder}, which does not hold: {first(lacking)}")
    if not set(theirs) & set(own):
        raise CheckpointError(f"{base} and {folder} have no tensor in common")
    reader, below = TensorReader(), TensorReader()
    tensors = []
    for key, stored in own.items():
        planned = as_stored(stored.name, stored, reader)
        if key in theirs and stored.info.dtype.startswith(("F", "BF")):
            _check_shapes(key, stored, theirs[key])
            planned = Planned(planned.name, planned.info, partial(_combined, planned, theirs[key], below, sign))
        tensors.append(planned)
    return tensors


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
