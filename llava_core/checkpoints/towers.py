"""Where a vision tower's configuration and weights come from: a folder, the hub, or the checkpoint that names it.

Reads configurations, not weights. Knows nothing about decoders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from llava_core.architectures import read_tower
from llava_core.checkpoints.access import check_access
from llava_core.checkpoints.files import has_model, naming, read_json
from llava_core.checkpoints.hub import Hub
from llava_core.config import BIOVIL_T, JsonObject
from llava_core.errors import CheckpointError
from llava_core.fields import Fields, shown
from llava_core.vision.biovil_keys import tensor_names, to_biovil_t

_LARGE: JsonObject = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
# Those that released checkpoints name, so that one that brings their weights along needs nothing else.
KNOWN_TOWERS: dict[str, JsonObject] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}
# What RaDialog's config.json calls its tower, and the file that holds the one it was trained from.
BIOVIL = "biovil"
BIOVIL_CONFIG: JsonObject = {"model_type": BIOVIL_T}
BIOVIL_FILE = "biovil_t_image_model_proj_size_128.pt"
# Hub ids that the original code takes for towers, and SigLIP's: nothing else is worth asking the network about.
_ON_THE_HUB = re.compile(r"^(openai|laion|apple)/|ShareGPT4V|clip|siglip", re.IGNORECASE)


@dataclass(frozen=True)
class TowerSource:
    """A tower's configuration as `read_tower` gives it, and the folder it came from, None for a known one by name."""

    config: JsonObject
    folder: Path | None


def find_tower(name: str, checkpoint: Path, *, is_inside: bool, hub: Hub) -> TowerSource:
    """The tower that config.json names; with `is_inside` its weights are not needed from elsewhere.

    A name is a folder (as it stands, beside the checkpoint, or inside it) or a hub id. Raises CheckpointError naming
    the field when it is neither, or when what it names is no tower.
    """
    folder = None if hub.is_pinned(name) else local_folder(name, checkpoint)
    if folder is None and is_inside and name in KNOWN_TOWERS and not hub.is_pinned(name):
        # What is here may differ from what is usual.
        folder = hub.find_here(name, "config.json")
        if folder is None:
            return TowerSource(KNOWN_TOWERS[name], None)
    if folder is None and not _ON_THE_HUB.search(name):
        raise CheckpointError(
            f"{checkpoint / 'config.json'}: mm_vision_tower {shown(name)} is unknown: it is neither a folder here nor "
            "the hub id of a CLIP or SigLIP; correct the field, or put the tower beside the checkpoint"
        )
    if folder is None:
        folder = hub.find(name, f"the mm_vision_tower of {checkpoint / 'config.json'}")
    if not is_inside and not has_model(folder):
        raise CheckpointError(f"{folder}, the mm_vision_tower of {checkpoint}, holds no weights")
    settings = Fields(read_json(folder, "config.json"))
    with naming(folder / "config.json"):
        return TowerSource(_vision_part(settings), folder)


def find_biovil_file(checkpoint: Path) -> Path | None:
    """The released BioViL-T inside a checkpoint or beside it, where somebody put it."""
    return next((file for folder in (checkpoint, checkpoint.parent) if (file := folder / BIOVIL_FILE).exists()), None)


def check_biovil(checkpoint: Path, names: Set[str]) -> None:
    """Raise CheckpointError unless these tensors, under our names, make BioViL-T complete."""
    missing = sorted(to_biovil_t(name) for name in tensor_names() - names)
    if missing:
        raise CheckpointError(
            f"{checkpoint}/config.json: mm_vision_tower is {BIOVIL!r}, of which {len(missing)} tensors are missing: "
            f"{', '.join(missing[:3])}, ...; download non_lora_trainables.bin again, or, where the tower was not "
            f"trained, put {BIOVIL_FILE} of the hub's microsoft/BiomedVLP-BioViL-T into {checkpoint}"
        )


def local_folder(name: str, checkpoint: Path) -> Path | None:
    """The folder a name stands for. One that was moved together with its checkpoint is found by its last part."""
    candidates = [Path(name), checkpoint / name, checkpoint.parent / name]
    if Path(name).is_absolute():
        candidates += [checkpoint / Path(name).name, checkpoint.parent / Path(name).name]
    for path in candidates:
        check_access(path)
        # Not Path.exists, which raises for names that no folder can have.
        if path != checkpoint and os.path.exists(path / "config.json"):
            return path
    return None


def _vision_part(fields: Fields) -> JsonObject:
    """A tower's own configuration, alone or as half of a CLIP or SigLIP."""
    kind = fields.values.get("model_type")
    if kind in ("clip", "siglip"):
        half = fields.section("vision_config")
        return read_tower(Fields({**half.values, "model_type": f"{kind}_vision_model"}, half.path))
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(
            f"model_type {shown(kind)} is no known tower; known are clip, clip_vision_model, siglip and "
            "siglip_vision_model"
        )
    return read_tower(fields)
