"""The tower equals transformers' SigLIP at the layer a checkpoint selects, with all positions; so do its tiles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import SIGLIP_MEAN, SIGLIP_STD, PreprocessConfig, preprocess
from llava_core.vision.clip import normalise
from llava_core.vision.siglip import SiglipTower

SIDE, PATCH, WIDTH, LAYERS = 28, 14, 16, 3
ARCHITECTURE = {
    "model_type": "siglip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
VISION = VisionConfig(SIDE, PATCH, WIDTH, select_layer=-2, select_feature="patch", architecture=ARCHITECTURE)
PREPROCESS = PreprocessConfig(size=SIDE, mean=SIGLIP_MEAN, std=SIGLIP_STD)


@pytest.fixture(scope="module")
def reference() -> SiglipVisionModel:
    options = {name: value for name, value in ARCHITECTURE.items() if name != "model_type"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipVisionModel(SiglipVisionConfig(**options))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tiles() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8))


def build(reference: SiglipVisionModel, vision: VisionConfig = VISION, *, attention: str = "sdpa") -> SiglipTower:
    tower = SiglipTower(vision, PREPROCESS, attention=attention)
    tower.model.load_state_dict(reference.state_dict())
    return tower.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 1, 3])
@torch.inference_mode()
def test_features_equal_transformers_hidden_states(
    reference: SiglipVisionModel, tiles: torch.Tensor, layer: int, attention: str
) -> None:
    vision = replace(VISION, select_layer=layer)
    features = build(reference, vision, attention=attention)(tiles)
    pixels = (tiles.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = reference(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert features.shape == (2, vision.patches_per_side**2, WIDTH)


@torch.inference_mode()
def test_the_last_layer_is_read_before_the_final_norm(reference: SiglipVisionModel, tiles: torch.Tensor) -> None:
    features = build(reference, replace(VISION, select_layer=-1))(tiles)
    normed = reference(normalise(tiles, PREPROCESS)).last_hidden_state
    torch.testing.assert_close(reference.post_layernorm(features), normed, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features, normed, atol=1e-2)


@torch.inference_mode()
def test_a_picture_does_not_depend_on_its_neighbours(reference: SiglipVisionModel, tiles: torch.Tensor) -> None:
    tower = build(reference)
    torch.testing.assert_close(tower(tiles)[1], tower(tiles[1:])[0])


@torch.inference_mode()
def test_the_tower_computes_in_its_weights_dtype(reference: SiglipVisionModel, tiles: torch.Tensor) -> None:
    expected = build(reference)(tiles)
    got = build(reference).to(torch.bfloat16)(tiles)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_pooling_head_exists_only_if_configured() -> None:
    without = replace(VISION, architecture={**ARCHITECTURE, "vision_use_head": False})
    names = SiglipTower(without, PREPROCESS).state_dict()
    extra = set(SiglipTower(VISION, PREPROCESS).state_dict()) - set(names)
    assert extra
    assert all(name.startswith("model.head.") for name in extra)


def test_selecting_the_class_feature_is_refused() -> None:
    with pytest.raises(CheckpointError, match="mm_vision_select_feature is 'cls_patch'"):
        SiglipTower(replace(VISION, select_feature="cls_patch"), PREPROCESS)


@pytest.mark.parametrize("size", [(40, 40), (57, 31), (28, 28)])
def test_padded_pictures_equal_transformers(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    square = Image.new("RGB", (max(size), max(size)), (127, 127, 127))
    square.paste(image, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    expected = np.asarray(processor(square, return_tensors="np")["pixel_values"])
    got = normalise(torch.from_numpy(preprocess(image, PREPROCESS).copy()), PREPROCESS).numpy()
    assert np.abs(got - expected).max() < 1e-5


@pytest.mark.parametrize("size", [(40, 40), (57, 31), (28, 90)])
def test_stretched_pictures_equal_transformers(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    config = replace(PREPROCESS, aspect="crop", stretches=True)
    got = normalise(torch.from_numpy(preprocess(image, config).copy()), config).numpy()
    assert np.abs(got - expected).max() < 1e-5
