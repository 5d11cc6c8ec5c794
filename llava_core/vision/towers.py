"""Selects the vision tower that a configuration names, by exact name. The one place that lists them.

Builds modules; reads no weights and no files.
"""

from collections.abc import Sequence
from typing import TypeAlias

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.biovil import BioVilPreprocessConfig
from llava_core.images.preprocess import PreprocessConfig
from llava_core.kernels.attention import NAME as DENSE
from llava_core.vision.biovil_t import BioVilTTower
from llava_core.vision.clip import ClipTower
from llava_core.vision.s2 import ClipS2Tower
from llava_core.vision.siglip import SiglipTower

# All take uint8 tiles and return features, and have `config`, `preprocess`, `model.device` and `model.dtype`.
VisionTower: TypeAlias = ClipTower | SiglipTower | BioVilTTower

# By the `model_type` of a tower's configuration.
_CLIP, _SIGLIP, _BIOVIL_T = "clip_vision_model", "siglip_vision_model", "biovil_t"
TOWERS: dict[str, type[VisionTower]] = {_CLIP: ClipTower, _SIGLIP: SiglipTower, _BIOVIL_T: BioVilTTower}


def build_tower(
    config: VisionConfig,
    preprocess: PreprocessConfig | BioVilPreprocessConfig,
    *,
    s2_scales: Sequence[int] = (),
    attention: str = DENSE,
) -> VisionTower:
    """The tower of a configuration, without its weights; with `s2_scales` (pixels) CLIP becomes CLIP-S2.

    `attention` is transformers' name of an implementation. Raises CheckpointError naming the field for an unknown
    tower, and for settings that the tower does not support.
    """
    tower = tower_class(config)
    if s2_scales and tower is not ClipTower:
        raise CheckpointError(f"s2 is set, but the tower is {_kind(config)!r}; only {_CLIP} is read at several scales")
    if tower is BioVilTTower and isinstance(preprocess, BioVilPreprocessConfig):
        return BioVilTTower(config, preprocess)
    if tower is BioVilTTower or isinstance(preprocess, BioVilPreprocessConfig):
        raise CheckpointError(
            f"the tower is {_kind(config)!r}, but pictures are preprocessed by {type(preprocess).__name__}"
        )
    if tower is SiglipTower:
        return SiglipTower(config, preprocess, attention=attention)
    if s2_scales:
        return ClipS2Tower(config, preprocess, s2_scales, attention=attention)
    return ClipTower(config, preprocess, attention=attention)


def tower_class(config: VisionConfig) -> type[VisionTower]:
    """The class that builds a configuration's tower. Raises CheckpointError naming the field and the known towers."""
    kind = _kind(config)
    if kind not in TOWERS:
        raise CheckpointError(
            f"vision_config: model_type is {kind!r}, which is not a known tower; known are {', '.join(sorted(TOWERS))}"
        )
    return TOWERS[kind]


def _kind(config: VisionConfig) -> str:
    # LLaVA's configurations in transformers leave out the model type for CLIP.
    return str(config.architecture.get("model_type", _CLIP))
