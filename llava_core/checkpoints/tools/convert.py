"""Converts between llava-hf and original checkpoints; numbers are never changed, only their names and files.

A field that the new layout cannot express is refused, not dropped. An original written as llava-hf gets a row for
`<image>`, which transformers looks up before it puts features there, and keeps its own settings in `original/`, from
which converting back restores them. Weights are read and written one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llava_core.checkpoints.accounting import check_shapes, check_tensors
from llava_core.checkpoints.contents import Stored, stored_tensors
from llava_core.checkpoints.describe import load_preprocess_config
from llava_core.checkpoints.files import naming, read_json
from llava_core.checkpoints.headers import TensorInfo
from llava_core.checkpoints.keymaps import VOCABULARY_KEYS, Key, to_llava_hf, to_original, to_tower
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.original_config import original_json, read_original_config
from llava_core.checkpoints.shapes import decoder_fields
from llava_core.checkpoints.tensors import TensorReader
from llava_core.checkpoints.tools.merge import rewrite
from llava_core.checkpoints.tools.save import check_llava_hf, preprocessor_json, write_settings
from llava_core.checkpoints.tools.tokenizer_files import changed_tokens, with_image_token
from llava_core.checkpoints.tools.writing import (
    DEFAULT_SHARD_SIZE,
    ORIGINAL_FOLDER,
    Planned,
    as_stored,
    copy_files,
    copy_text_files,
    new_folder,
    write_json,
    write_model,
)
from llava_core.checkpoints.towers import KNOWN_TOWERS
from llava_core.checkpoints.weights import first
from llava_core.config import JsonObject, ModelConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig

Target = Literal["llava-hf", "original"]
Contents = Mapping[Key, Stored]
# CLIP's defaults, which its configurations leave out.
_CLIP_DEFAULTS = {"hidden_act": "quick_gelu", "num_channels": 3, "layer_norm_eps": 1e-5}
# The name of the folder for a tower without a hub id.
_TOWER_FOLDER = "vision_tower"


def convert(
    source: str, out: Path, to: Target, *, offline: bool = False, max_shard_size: int = DEFAULT_SHARD_SIZE
) -> None:
    """Write a whole checkpoint in the other layout, or in its own as safetensors of the given shard size.

    Raises CheckpointError when `out` exists, when the source is not whole, and for fields the layout cannot express.
    """
    checkpoint = open_checkpoint(source, offline=offline)
    if checkpoint.adapter is not None or not checkpoint.is_complete:
        raise CheckpointError(f"{checkpoint.folder} needs a base; make one model of the two first: llava merge")
    check_tensors(checkpoint)
    with new_folder(out) as folder:
        if to == checkpoint.config.dialect.replace("_", "-"):
            rewrite(checkpoint, folder, out, max_shard_size=max_shard_size)
            return
        stored = stored_tensors(checkpoint.weights)
        check_shapes(checkpoint.config, stored)
        if to == "llava-hf":
            _to_llava_hf(checkpoint, stored, folder, max_shard_size)
        else:
            _to_original(checkpoint, stored, folder, out, max_shard_size)


def _to_llava_hf(checkpoint: Checkpoint, stored: Contents, folder: Path, max_shard_size: int) -> None:
    config = checkpoint.config
    check_llava_hf(config)
    preprocess = _preprocess_config(checkpoint)
    tokenizer, image_token = with_image_token(checkpoint)
    tokenizer.save_pretrained(folder)
    copy_files(checkpoint.folder, folder, ["tokenizer.model"])
    rows = max(config.vocab_size, image_token + 1)
    text = {**config.text, "vocab_size": rows, "tie_word_embeddings": config.tie_word_embeddings}
    new = replace(config, text=text, vocab_size=rows, image_token_id=image_token)
    write_settings(folder, new, preprocess, dtype=config.dtype)
    (folder / ORIGINAL_FOLDER).mkdir()
    write_json(folder / ORIGINAL_FOLDER / "config.json", checkpoint.settings)
    copy_text_files(checkpoint.folder, folder / ORIGINAL_FOLDER)
    eos = {"eos_token_id": list(config.eos_token_ids), "do_sample": False}
    write_json(folder / "generation_config.json", {"bos_token_id": tokenizer.bos_token_id, **eos})
    copy_files(folder / ORIGINAL_FOLDER, folder, ["generation_config.json"])
    write_model(folder, _plan(stored, to_llava_hf, rows), max_shard_size=max_shard_size)


def _to_original(checkpoint: Checkpoint, stored: Contents, folder: Path, out: Path, max_shard_size: int) -> None:
    config, kept = checkpoint.config, checkpoint.folder / ORIGINAL_FOLDER
    preprocess = _preprocess_config(checkpoint)
    tower = _known_tower(config, preprocess)
    name = tower or str((out / _TOWER_FOLDER).resolve())
    aspect = "square" if preprocess.aspect == "crop" else preprocess.aspect
    settings, rows = original_json(config, name, aspect), config.vocab_size
    if (kept / "config.json").exists():
        settings = {**_kept_settings(kept, config), "mm_vision_tower": name, "unfreeze_mm_vision_tower": True}
        rows = settings.get("vocab_size", rows)
    write_json(folder / "config.json", settings)
    copy_text_files(kept if (kept / "config.json").exists() else checkpoint.folder, folder)
    name_of = partial(to_original, projector_type=config.projector_type)
    write_model(folder, _plan(stored, name_of, rows), max_shard_size=max_shard_size)
    if tower is None:
        # The original code loads the named tower before it uses the one inside.
        _write_tower(config, stored, folder / _TOWER_FOLDER, preprocess, max_shard_size)


def _preprocess_config(checkpoint: Checkpoint) -> PreprocessConfig:
    preprocess = load_preprocess_config(checkpoint)
    if not isinstance(preprocess, PreprocessConfig):
        raise CheckpointError(
            f"mm_vision_tower {checkpoint.config.tower_name!r} cannot be saved as llava-hf: "
            "transformers has no BioViL-T"
        )
    return preprocess


def _known_tower(config: ModelConfig, preprocess: PreprocessConfig) -> str | None:
    """The hub id of a released tower with exactly this architecture and the same preprocessing, if there is one."""
    plain = PreprocessConfig(size=config.tile_size, aspect=preprocess.aspect, pinpoints=config.pinpoints)
    architecture = {**_CLIP_DEFAULTS, **config.vision.architecture}
    for name, known in KNOWN_TOWERS.items():
        wanted = {**_CLIP_DEFAULTS, **known}
        del wanted["projection_dim"]
        if preprocess == plain and all(architecture.get(field) == value for field, value in wanted.items()):
            return name
    return None


def _write_tower(
    config: ModelConfig, stored: Contents, folder: Path, preprocess: PreprocessConfig, max_shard_size: int
) -> None:
    folder.mkdir()
    architecture = dict(config.vision.architecture)
    kind = "CLIPVisionModel" if architecture["model_type"] == "clip_vision_model" else "SiglipVisionModel"
    write_json(folder / "config.json", {**architecture, "architectures": [kind]})
    aspect: JsonObject = preprocessor_json(replace(preprocess, aspect="crop", pinpoints=()))
    write_json(folder / "preprocessor_config.json", aspect)
    reader = TensorReader()
    tensors = [as_stored(to_tower(key), each, reader) for key, each in stored.items() if key.part == "tower"]
    write_model(folder, tensors, max_shard_size=max_shard_size)


def _kept_settings(kept: Path, config: ModelConfig) -> JsonObject:
    """The original's own config.json. Raises CheckpointError if it no longer describes the model."""
    settings = read_json(kept, "config.json")
    with naming(kept / "config.json"):
        was = read_original_config(settings, config.vision.architecture)
    before, now = _shape(was), _shape(config)
    for field in before:
        if before[field] != now[field]:
            raise CheckpointError(
                f"{kept / 'config.json'}: {field} is {before[field]!r}, but the model's is {now[field]!r}; "
                f"it has changed since it was converted: remove {kept}, then its own settings are written"
            )
    # A row was added for `<image>` only where its id directly follows the original's rows; otherwise it has its own.
    rows = was.vocab_size + (config.image_token_id == was.vocab_size)
    changed = changed_tokens(kept, kept.parent)
    if config.vocab_size != rows or changed:
        raise CheckpointError(
            f"{kept}: tokens or rows have changed since the model was converted ({rows} rows then, {config.vocab_size} "
            f"now; other tokens: {first(changed)}); remove {kept}, then all are kept"
        )
    return settings


def _shape(config: ModelConfig) -> JsonObject:
    """The settings in the original's config.json for tensors and tiles, except the number of tokens."""
    fields = decoder_fields(config)
    decoder = ("model_type", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    whole = ("hidden_size", "projector_type", "merge_type", "pinpoints", "tie_word_embeddings", "vision")
    return {**{name: vars(config)[name] for name in whole}, **{name: fields[name] for name in (*decoder, "head_dim")}}


def _plan(stored: Contents, name_of: Callable[[Key], str], rows: int) -> list[Planned]:
    reader = TensorReader()
    tensors = []
    for key, each in stored.items():
        planned = as_stored(name_of(key), each, reader)
        if key in VOCABULARY_KEYS and each.info.shape[0] != rows:
            info = TensorInfo(each.info.dtype, (rows, *each.info.shape[1:]))
            planned = Planned(planned.name, info, partial(_with_rows, planned, rows))
        tensors.append(planned)
    return tensors


def _with_rows(planned: Planned, rows: int) -> Tensor:
    """The tensor cut to `rows`, or padded with the mean of all rows. In the head, such a row's logit is the mean of the
    others and so never the largest; as an embedding it is never used."""
    tensor = planned.make()
    if rows <= len(tensor):
        return tensor[:rows]
    mean = tensor.float().mean(0).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])
