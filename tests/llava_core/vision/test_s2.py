"""CLIP-S2 equals a slow reference: every square of every scale runs through CLIP alone, averaged patch by patch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.vision.clip import ClipTower, normalise
from llava_core.vision.s2 import ClipS2Tower, merge_squares, split_squares

SIDE, PATCH, WIDTH = 28, 14, 16
GRID = SIDE // PATCH
SCALES = (28, 56, 84)
OPTIONS = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
VISION = VisionConfig(SIDE, PATCH, WIDTH * 3, select_layer=-2, select_feature="patch", architecture=OPTIONS)
PREPROCESS = PreprocessConfig(size=84)


@pytest.fixture(scope="module")
def reference() -> CLIPVisionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPVisionModel(CLIPVisionConfig(**OPTIONS, initializer_factor=3.0))
    return model.eval()


@pytest.fixture(scope="module")
def tiles() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8))


def build(reference: CLIPVisionModel, vision: VisionConfig = VISION) -> ClipS2Tower:
    tower = ClipS2Tower(vision, PREPROCESS, SCALES)
    tower.model.load_state_dict(reference.state_dict())
    return tower.eval()


def reference_features(clip: CLIPVisionModel, tile: torch.Tensor, layer: int) -> torch.Tensor:
    """Computes the features of one tile (84, 84, 3) → (GRID², 3 * WIDTH), in loops."""
    pixels = normalise(tile[None], PREPROCESS)
    result = torch.zeros(GRID, GRID, 3 * WIDTH)
    for index, scale in enumerate(SCALES):
        per_side = scale // SIDE
        scaled = torch.nn.functional.interpolate(pixels, (scale, scale), mode="bicubic", align_corners=False)
        whole = torch.zeros(per_side * GRID, per_side * GRID, WIDTH)
        for row in range(per_side):
            for column in range(per_side):
                square = scaled[:, :, row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
                hidden = clip(square, output_hidden_states=True).hidden_states[layer][0, 1:]
                for patch in range(GRID * GRID):
                    whole[row * GRID + patch // GRID, column * GRID + patch % GRID] = hidden[patch]
        for y in range(GRID):
            for x in range(GRID):
                block = whole[y * per_side : (y + 1) * per_side, x * per_side : (x + 1) * per_side]
                result[y, x, index * WIDTH : (index + 1) * WIDTH] = block.mean((0, 1))
    return result.flatten(0, 1)


@pytest.mark.parametrize("layer", [-2, -1, 1])
@torch.inference_mode()
def test_features_equal_the_reference(reference: CLIPVisionModel, tiles: torch.Tensor, layer: int) -> None:
    vision = replace(VISION, select_layer=layer)
    features = build(reference, vision)(tiles)
    expected = torch.stack([reference_features(reference, tile, layer) for tile in tiles])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert features.shape == (2, vision.patches_per_side**2, vision.hidden_size)


@torch.inference_mode()
def test_a_single_scale_equals_plain_clip(reference: CLIPVisionModel) -> None:
    tiles = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8))
    vision, preprocess = replace(VISION, hidden_size=WIDTH), PreprocessConfig(size=SIDE)
    plain = ClipTower(vision, preprocess).eval()
    plain.model.load_state_dict(reference.state_dict())
    single = ClipS2Tower(vision, preprocess, [SIDE]).eval()
    single.load_state_dict(plain.state_dict())
    torch.testing.assert_close(single(tiles), plain(tiles))


@torch.inference_mode()
def test_the_order_of_the_scales_does_not_matter(reference: CLIPVisionModel, tiles: torch.Tensor) -> None:
    other = ClipS2Tower(VISION, PREPROCESS, [84, 28, 56]).eval()
    other.model.load_state_dict(reference.state_dict())
    assert torch.equal(other(tiles), build(reference)(tiles))


@torch.inference_mode()
def test_the_tower_computes_in_its_weights_dtype(reference: CLIPVisionModel, tiles: torch.Tensor) -> None:
    expected = build(reference)(tiles)
    got = build(reference).to(torch.bfloat16)(tiles)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_squares_are_split_row_by_row_and_merge_back() -> None:
    image = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    squares = split_squares(image, 3)
    assert squares.shape == (18, 3, 2, 2)
    assert torch.equal(squares[1], image[0, :, 0:2, 2:4])
    assert torch.equal(squares[3], image[0, :, 2:4, 0:2])
    assert torch.equal(squares[9], image[1, :, 0:2, 0:2])
    assert torch.equal(merge_squares(squares, 3), image)


@pytest.mark.parametrize("scales", [[], [56, 84], [28, 28], [28, 50], [28, 56, 20]])
def test_impossible_scales_are_refused(scales: list[int]) -> None:
    with pytest.raises(CheckpointError, match="s2_scales"):
        ClipS2Tower(replace(VISION, hidden_size=WIDTH * max(len(scales), 1)), PREPROCESS, scales)


def test_settings_that_contradict_the_scales_are_refused() -> None:
    with pytest.raises(CheckpointError, match="reach 84 pixels, but pictures are preprocessed to 28"):
        ClipS2Tower(VISION, PreprocessConfig(size=28), SCALES)
    with pytest.raises(CheckpointError, match="hidden_size is 16"):
        ClipS2Tower(replace(VISION, hidden_size=WIDTH), PREPROCESS, SCALES)
    with pytest.raises(CheckpointError, match="'cls_patch'"):
        ClipS2Tower(replace(VISION, select_feature="cls_patch"), PREPROCESS, SCALES)
