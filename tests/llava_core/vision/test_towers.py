"""The tower registry: exact names, one class per name, and errors that name the field and the known towers."""

from typing import Any

import pytest
import torch

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.biovil import BioVilPreprocessConfig
from llava_core.images.preprocess import PreprocessConfig
from llava_core.vision.biovil_t import BioVilTTower
from llava_core.vision.clip import ClipTower
from llava_core.vision.s2 import ClipS2Tower
from llava_core.vision.siglip import SiglipTower
from llava_core.vision.towers import TOWERS, VisionTower, build_tower, tower_class

TRANSFORMER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
RESNET = {"depths": [1, 1, 1, 1], "trunk_width": 2, "width": 8, "num_heads": 2, "num_blocks": 1}


def vision(kind: str | None, *, scales: int = 1) -> VisionConfig:
    named = {} if kind is None else {"model_type": kind}
    if kind == "biovil_t":
        return VisionConfig(64, 32, 16, -1, "patch", {**named, **RESNET})
    return VisionConfig(28, 14, 16 * scales, -2, "patch", {**named, **TRANSFORMER})


def build(kind: str | None, **options: Any) -> VisionTower:
    if kind == "biovil_t":
        return build_tower(vision(kind), BioVilPreprocessConfig(resize=64, size=64), **options)
    return build_tower(vision(kind), PreprocessConfig(size=28), **options)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (None, ClipTower),
        ("clip_vision_model", ClipTower),
        ("siglip_vision_model", SiglipTower),
        ("biovil_t", BioVilTTower),
    ],
)
@torch.inference_mode()
def test_every_tower_is_built_by_name_and_has_the_same_interface(kind: str | None, expected: type[VisionTower]) -> None:
    assert tower_class(vision(kind)) is expected
    tower = build(kind).eval()
    assert type(tower) is expected
    size = tower.preprocess.size
    features = tower(torch.zeros(2, size, size, 3, dtype=torch.uint8))
    assert features.shape == (2, tower.config.patches_per_side**2, tower.config.hidden_size)
    assert (tower.model.device, tower.model.dtype) == (torch.device("cpu"), torch.float32)
    assert all(name.startswith("model.") for name in tower.state_dict())


def test_scales_build_a_multi_scale_clip() -> None:
    tower = build_tower(vision("clip_vision_model", scales=2), PreprocessConfig(size=56), s2_scales=(28, 56))
    assert isinstance(tower, ClipS2Tower)
    assert tower.scales == (28, 56)


def test_the_attention_setting_is_passed_on() -> None:
    for kind in ("clip_vision_model", "siglip_vision_model"):
        assert build(kind, attention="eager").model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["clip", "siglip", "CLIP_VISION_MODEL", "dinov2", ""])
def test_an_unknown_tower_is_refused_and_the_known_ones_listed(kind: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        build_tower(vision(kind), PreprocessConfig(size=28))
    assert f"model_type is {kind!r}" in str(raised.value)
    assert all(known in str(raised.value) for known in TOWERS)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "biovil_t"])
def test_only_clip_supports_several_scales(kind: str) -> None:
    with pytest.raises(CheckpointError, match="s2 is set"):
        build(kind, s2_scales=(28, 56))


def test_preprocessing_of_another_tower_is_refused() -> None:
    with pytest.raises(CheckpointError, match="preprocessed by PreprocessConfig"):
        build_tower(vision("biovil_t"), PreprocessConfig(size=64))
    with pytest.raises(CheckpointError, match="preprocessed by BioVilPreprocessConfig"):
        build_tower(vision("clip_vision_model"), BioVilPreprocessConfig(resize=28, size=28))
