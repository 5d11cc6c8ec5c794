"""The tower equals transformers' CLIP at the layer a checkpoint selects, and normalises as CLIP's processor does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from llava_core.checkpoints.describe import read_preprocess_config
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.config import SelectFeature, VisionConfig
from llava_core.images.preprocess import CLIP_MEAN, CLIP_STD, PreprocessConfig
from llava_core.vision.clip import ClipTower, normalise
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, VISION_HIDDEN


@pytest.fixture(scope="module")
def tiles() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))


@pytest.fixture
def vision(tiny_checkpoint: Path) -> VisionConfig:
    return open_checkpoint(tiny_checkpoint).config.vision


@pytest.fixture
def reference(reference_model: LlavaForConditionalGeneration) -> CLIPVisionModel:
    return reference_model.model.vision_tower


def build(vision: VisionConfig, folder: Path, reference: CLIPVisionModel) -> ClipTower:
    tower = ClipTower(vision, read_preprocess_config(folder))
    tower.model.load_state_dict(reference.state_dict())
    return tower.eval()


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 1, 3])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@torch.inference_mode()
def test_features_equal_transformers_hidden_states(
    tiles: torch.Tensor,
    vision: VisionConfig,
    reference: CLIPVisionModel,
    tiny_checkpoint: Path,
    layer: int,
    select: SelectFeature,
) -> None:
    vision = replace(vision, select_layer=layer, select_feature=select)
    features = build(vision, tiny_checkpoint, reference)(tiles)
    pixels = normalise(tiles, PreprocessConfig(size=IMAGE_SIZE))
    expected = reference(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(features, expected if select == "cls_patch" else expected[:, 1:])
    assert features.shape == (2, vision.tokens_per_tile, VISION_HIDDEN)


@torch.inference_mode()
def test_a_picture_does_not_depend_on_its_neighbours(
    tiles: torch.Tensor, vision: VisionConfig, reference: CLIPVisionModel, tiny_checkpoint: Path
) -> None:
    tower = build(vision, tiny_checkpoint, reference)
    torch.testing.assert_close(tower(tiles)[1], tower(tiles[1:])[0])


@torch.inference_mode()
def test_the_tower_computes_in_its_weights_dtype(
    tiles: torch.Tensor, vision: VisionConfig, reference: CLIPVisionModel, tiny_checkpoint: Path
) -> None:
    tower = build(vision, tiny_checkpoint, reference)
    expected = tower(tiles)
    got = tower.to(torch.bfloat16)(tiles)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert got.shape == (2, IMAGE_TOKENS, VISION_HIDDEN)


def test_normalisation_equals_clips() -> None:
    tile = np.array([[[[0, 128, 255]]]], np.uint8)
    got = normalise(torch.from_numpy(tile), PreprocessConfig(size=1))[0, :, 0, 0]
    expected = (np.array([0, 128 / 255, 1]) - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
