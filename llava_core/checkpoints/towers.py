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
# The towers that released checkpoints name, so that a checkpoint including their weights needs nothing else.
KNOWN_TOWERS: dict[str, JsonObject] = {
    "openai/clip-vit-large-patch14": {**_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_LARGE, "image_size": 336},
}
# The tower's name in RaDialog's config.json, and the file with the released tower it was trained from.
BIOVIL = "biovil"
BIOVIL_CONFIG: JsonObject = {"model_type": BIOVIL_T}
BIOVIL_FILE = "biovil_t_image_model_proj_size_128.pt"
# Hub ids that the original code accepts as towers, and SigLIP's: no others are looked up on the network.
_ON_THE_HUB = re.compile(r"^(openai|laion|apple)/|ShareGPT4V|clip|siglip", re.IGNORECASE)


@dataclass(frozen=True)
class TowerSource:
    """A tower's configuration as from `read_tower`, and the folder it came from; None for a known tower."""

    config: JsonObject
    folder: Path | None


def find_tower(name: str, checkpoint: Path, *, is_inside: bool, hub: Hub) -> TowerSource:
    """The tower that config.json names; with `is_inside` its weights are not needed from elsewhere.

    A name is a folder (taken literally, next to the checkpoint, or inside it) or a hub id. Raises CheckpointError
    naming the field when it is neither, or does not name a tower.
    """
    folder = None if hub.is_pinned(name) else local_folder(name, checkpoint)
    if folder is None and is_inside and name in KNOWN_TOWERS and not hub.is_pinned(name):
        # A cached configuration takes precedence: it may differ from the known one.
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
    """The released BioViL-T file inside a checkpoint or next to it, if it is there."""
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
    """The folder that a name refers to. A tower moved together with its checkpoint is found by its folder's name."""
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
    """A tower's configuration, from its own file or from the vision half of a CLIP or SigLIP."""
    kind = fields.values.get("model_type")
    if kind in ("clip", "siglip"):
        half = fields.section("vision_config")
        return read_tower(Fields({**half.values, "model_type": f"{kind}_vision_model"}, half.path))
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise CheckpointError(
            f"model_type {shown(kind)} is not a known tower; known are clip, clip_vision_model, siglip and "
            "siglip_vision_model"
        )
    return read_tower(fields)
