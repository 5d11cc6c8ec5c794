"""BioViL-T combines its parts: static beside difference features, with and without a prior."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.biovil import BioVilPreprocessConfig
from llava_core.vision.biovil_t import BioVilTTower

SIDE, GRID, WIDTH = 96, 3, 8
SMALL = {"depths": [1, 1, 1, 1], "trunk_width": 2, "width": WIDTH, "num_heads": 2, "num_blocks": 1}
VISION = VisionConfig(SIDE, 32, 2 * WIDTH, -1, "patch", {"model_type": "biovil_t", **SMALL})
PREPROCESS = BioVilPreprocessConfig(resize=100, size=SIDE)
RELEASED = VisionConfig(448, 32, 512, -1, "patch", {"model_type": "biovil_t"})


@pytest.fixture
def tower() -> BioVilTTower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = BioVilTTower(VISION, PREPROCESS)
        for parameter in tower.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return tower.eval()


def tiles(seed: int, count: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8))


def static_features(tower: BioVilTTower, pictures: Tensor) -> Tensor:
    """Computes static features (N, WIDTH, GRID, GRID) with the 1x1 convolution written out."""
    trunk = tower.model.trunk(pictures.permute(0, 3, 1, 2).float() / 255)
    return torch.einsum("oc,nchw->nohw", tower.model.narrow.weight[:, :, 0, 0], trunk)


def rows(features: Tensor) -> Tensor:
    """Rearranges (N, C, GRID, GRID) → (N, GRID², C), patch by patch."""
    cells = [features[:, :, row, column] for row in range(GRID) for column in range(GRID)]
    return torch.stack(cells, 1)


@torch.inference_mode()
def test_without_a_prior_a_learned_vector_is_appended_to_every_patch(tower: BioVilTTower) -> None:
    features = tower(tiles(0))
    assert features.shape == (2, VISION.patches_per_side**2, VISION.hidden_size)
    static = rows(static_features(tower, tiles(0)))
    torch.testing.assert_close(features[:, :, :WIDTH], static, atol=1e-5, rtol=1e-5)
    missing = tower.model.missing_prior.view(1, 1, WIDTH).expand(2, GRID * GRID, -1)
    assert torch.equal(features[:, :, WIDTH:], missing)


@torch.inference_mode()
def test_with_a_prior_the_difference_is_appended_to_every_patch(tower: BioVilTTower) -> None:
    features = tower(tiles(0), tiles(1))
    static, before = static_features(tower, tiles(0)), static_features(tower, tiles(1))
    torch.testing.assert_close(features[:, :, :WIDTH], rows(static), atol=1e-5, rtol=1e-5)
    difference = rows(tower.model.pooler(static, before))
    torch.testing.assert_close(features[:, :, WIDTH:], difference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prior", [None, tiles(1)])
@torch.inference_mode()
def test_a_picture_does_not_depend_on_its_neighbours(tower: BioVilTTower, prior: Tensor | None) -> None:
    together = tower(tiles(0), prior)
    alone = tower(tiles(0)[1:], None if prior is None else prior[1:])
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_tower_computes_in_its_weights_dtype(tower: BioVilTTower) -> None:
    expected = tower(tiles(0), tiles(1))
    got = tower.to(torch.bfloat16)(tiles(0), tiles(1))
    assert (got.dtype, tower.model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert tower.model.device == torch.device("cpu")
    assert (got.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_the_released_sizes_give_196_tokens_of_512_features() -> None:
    with torch.device("meta"):
        tower = BioVilTTower(RELEASED, BioVilPreprocessConfig()).eval()
        pictures = torch.empty(2, 448, 448, 3, dtype=torch.uint8)
        assert tower(pictures).shape == tower(pictures, pictures).shape == (2, 196, 512)
    assert RELEASED.patches_per_side**2 == 196


def test_priors_of_another_shape_fail_an_assertion(tower: BioVilTTower) -> None:
    with pytest.raises(AssertionError, match="priors"):
        tower(tiles(0), tiles(1, count=1))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (replace(VISION, architecture={"widht": 8}), "has no widht; known are depths"),
        (replace(VISION, hidden_size=512), "16 features; the configuration says 32 and 512"),
        (replace(VISION, patch_size=16), "patches of 32 pixels"),
        (replace(VISION, image_size=100), "multiples of 32 pixels, not 100"),
        (replace(VISION, select_feature="cls_patch"), "'cls_patch'"),
        (replace(VISION, image_size=448), "takes 448 pixels, but pictures are preprocessed to 96"),
        (replace(VISION, architecture={**SMALL, "depths": [1, 1]}), "four stages"),
        (replace(VISION, architecture={**SMALL, "num_blocks": 0}), "positive sizes"),
        (replace(VISION, architecture={**SMALL, "num_heads": 3}), "multiple of 4 and of num_heads"),
    ],
)
def test_unsupported_settings_are_refused(vision: VisionConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        BioVilTTower(vision, PREPROCESS)
