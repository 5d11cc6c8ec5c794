"""Merges a LoRA or a projector with its base into one whole model, written tensor by tensor.

Dtypes: a weight that LoRA changes is computed in float32 and rounded once, to the base's stored dtype; a separate
projector becomes float16, as the original code rounds it; every other tensor is written bit for bit as stored. So the
merged model computes the same as the unmerged one when both are loaded in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava_core.checkpoints.accounting import check_adapter, check_shapes, check_tensors
from llava_core.checkpoints.contents import Stored, stored_tensors
from llava_core.checkpoints.headers import DTYPES
from llava_core.checkpoints.keymaps import Key, from_tower, to_llava_hf, to_original
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.lora import Lora, open_lora
from llava_core.checkpoints.tensors import TensorReader
from llava_core.checkpoints.tools.writing import (
    DEFAULT_SHARD_SIZE,
    Planned,
    as_stored,
    copy_folder,
    copy_settings,
    copy_text_files,
    new_folder,
    write_json,
    write_model,
)
from llava_core.checkpoints.towers import local_folder
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError


def merge(
    path: str, out: Path, *, base: str | None = None, offline: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE
) -> None:
    """Write the whole model, in the original layout, or as llava-hf where an adapter's base is llava-hf.

    Raises CheckpointError when `out` exists, when there is nothing to merge, and for a base that does not fit.
    """
    checkpoint = open_checkpoint(path, base, offline=offline)
    if checkpoint.is_complete and checkpoint.adapter is None:
        raise CheckpointError(f"{checkpoint.folder} is a whole model; there is nothing to merge")
    check_tensors(checkpoint)
    with new_folder(out) as folder:
        rewrite(checkpoint, folder, out, max_shard_size=max_shard_size)


def rewrite(checkpoint: Checkpoint, folder: Path, out: Path, *, max_shard_size: int) -> None:
    """Write a whole checkpoint in its own layout, LoRA added, into `folder`, which will be renamed to `out`."""
    lora = open_lora(checkpoint.adapter) if checkpoint.adapter else None
    if checkpoint.config.dialect == "llava_hf":
        copy_settings(checkpoint.folder, folder)
        tensors = _plan(checkpoint.config, stored_tensors(checkpoint.weights), lora, to_llava_hf)
    else:
        changes_tower = lora is not None and any(key.part == "tower" for key in {**lora.pairs, **lora.replaced})
        weights = [each for each in checkpoint.weights if changes_tower or each.key_map is not from_tower]
        name_of = partial(to_original, projector_type=checkpoint.config.projector_type)
        tensors = _plan(checkpoint.config, stored_tensors(weights), lora, name_of)
        settings = {**checkpoint.settings, **_tower_fields(checkpoint, folder, out)}
        if changes_tower:
            # A changed tower is no longer the named one: it is stored inside, and marked to be used from there.
            settings["unfreeze_mm_vision_tower"] = True
        write_json(folder / "config.json", settings)
        copy_text_files(checkpoint.text_folder, folder)
    write_model(folder, tensors, max_shard_size=max_shard_size)


def _tower_fields(checkpoint: Checkpoint, folder: Path, out: Path) -> dict[str, str]:
    """The field that locates the tower from the new folder: a folder by its full path, copied if the checkpoint's own.

    A hub id is unchanged.
    """
    named = local_folder(checkpoint.config.tower_name or "", checkpoint.folder)
    if named is None:
        return {}
    if named.resolve().is_relative_to(checkpoint.folder.resolve()):
        copy_folder(named, folder / named.name)
        named = out / named.name
    return {"mm_vision_tower": str(named.resolve())}


def _plan(
    config: ModelConfig, stored: dict[Key, Stored], lora: Lora | None, name_of: Callable[[Key], str]
) -> list[Planned]:
    reader, adapter = TensorReader(), TensorReader()
    if lora is not None:
        stored |= lora.replaced
        # Otherwise they would be detected only after half of the model is written.
        check_adapter(lora, stored)
    check_shapes(config, stored)
    tensors = [as_stored(name_of(key), each, reader) for key, each in stored.items()]
    if lora is None:
        return tensors
    return [
        replace(planned, make=partial(_changed, key, planned, lora, adapter)) if key in lora.pairs else planned
        for key, planned in zip(stored, tensors, strict=True)
    ]


def _changed(key: Key, planned: Planned, lora: Lora, reader: TensorReader) -> Tensor:
    dtype: torch.dtype = getattr(torch, DTYPES[planned.info.dtype][0])
    return lora.change(key, planned.make(), reader).to(dtype)
