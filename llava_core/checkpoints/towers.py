"""Where a vision tower's configuration and weights come from: a folder, the hub, or the checkpoint that names it.

Reads configurations, not weights. Knows nothing about decoders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llava_core.checkpoints.files import has_model, read_json, resolve_checkpoint
from llava_core.config import JsonObject
from llava_core.errors import CheckpointError

_LARGE: JsonObject = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
# Those that released checkpoints name, so that one that brings their weights along needs nothing else.
KNOWN_TOWERS: dict[str, JsonObject] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}
# Hub ids that the original code takes for towers, and SigLIP's: nothing else is worth asking the network about.
_ON_THE_HUB = re.compile(r"^(openai|laion|apple)/|ShareGPT4V|clip|siglip", re.IGNORECASE)


@dataclass(frozen=True)
class TowerSource:
    """A tower's configuration in transformers' form, and the folder it came from, None for a known one by name."""

    config: JsonObject
    folder: Path | None


def find_tower(name: str, checkpoint: Path, *, is_inside: bool, offline: bool) -> TowerSource:
    """The tower that config.json names; with `is_inside` its weights are not needed from elsewhere.

    A name is a folder (as it stands, beside the checkpoint, or inside it) or a hub id. Raises CheckpointError naming
    the field when it is neither, or when what it names is no tower.
    """
    folder = local_folder(name, checkpoint)
    if folder is None and is_inside and name in KNOWN_TOWERS:
        return TowerSource(KNOWN_TOWERS[name], None)
    if folder is None and not _ON_THE_HUB.search(name):
        raise CheckpointError(
            f"{checkpoint / 'config.json'}: mm_vision_tower {name!r} is unknown: it is neither a folder here nor the "
            "hub id of a CLIP or SigLIP; correct the field, or put the tower beside the checkpoint"
        )
    if folder is None:
        try:
            folder = resolve_checkpoint(name, offline=offline)
        except CheckpointError as error:
            raise CheckpointError(
                f"{checkpoint / 'config.json'}: mm_vision_tower {name!r} is missing: {error}"
            ) from error
    if not is_inside and not has_model(folder):
        raise CheckpointError(f"{folder}, the mm_vision_tower of {checkpoint}, holds no weights")
    return TowerSource(_vision_part(read_json(folder, "config.json"), folder), folder)


def local_folder(name: str, checkpoint: Path) -> Path | None:
    """The folder a name stands for. One that was moved together with its checkpoint is found by its last part."""
    candidates = [Path(name), checkpoint / name, checkpoint.parent / name]
    if Path(name).is_absolute():
        candidates += [checkpoint / Path(name).name, checkpoint.parent / Path(name).name]
    return next((path for path in candidates if (path / "config.json").exists() and path != checkpoint), None)


def _vision_part(config: JsonObject, folder: Path) -> JsonObject:
    """A tower's own configuration, alone or as half of a CLIP or SigLIP."""
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        return {**(config.get("vision_config") or {}), "model_type": f"{kind}_vision_model"}
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {kind!r} is no known tower; "
            "known are clip, clip_vision_model, siglip and siglip_vision_model"
        )
    return config
