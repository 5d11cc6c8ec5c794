"""A tower made ready for inference gives the same features as before, with fewer layers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_core.checkpoints.describe import read_preprocess_config
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.kernels.layer_gpu import QuickGelu
from llava_core.kernels.packed import PackedLinear
from llava_core.vision.inference import call_before_layers, ready_tower
from llava_core.vision.towers import VisionTower, build_tower
from tests.tiny import IMAGE_SIZE


def tiles(size: int = IMAGE_SIZE) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8))


def tower_of(folder: Path, layer: int, kind: str) -> VisionTower:
    vision, preprocess = open_checkpoint(folder).config.vision, read_preprocess_config(folder)
    torch.manual_seed(0)
    if kind == "CLIP":
        return build_tower(replace(vision, select_layer=layer), preprocess).eval()
    if kind == "CLIP-S2":
        preprocess = replace(preprocess, size=2 * IMAGE_SIZE)
        wide = replace(vision, select_layer=layer, hidden_size=2 * vision.hidden_size)
        return build_tower(wide, preprocess, s2_scales=(IMAGE_SIZE, 2 * IMAGE_SIZE)).eval()
    siglip = {**vision.architecture, "model_type": "siglip_vision_model"}
    return build_tower(replace(vision, select_layer=layer, architecture=siglip), preprocess).eval()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["CLIP", "CLIP-S2", "SigLIP"])
@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 1, 3])
def test_features_stay_the_same_and_unused_layers_are_removed(tiny_checkpoint: Path, layer: int, kind: str) -> None:
    tower = tower_of(tiny_checkpoint, layer, kind)
    pixels = tiles(2 * IMAGE_SIZE if kind == "CLIP-S2" else IMAGE_SIZE)
    before, num_parameters = tower(pixels), sum(1 for _ in tower.parameters())
    ready_tower(tower)
    torch.testing.assert_close(tower(pixels), before, atol=0, rtol=0)
    num_layers = tower.config.architecture["num_hidden_layers"]
    assert (sum(1 for _ in tower.parameters()) < num_parameters) == (layer not in (-1, num_layers))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_gpu_kernels_give_the_same_features(tiny_checkpoint: Path, kind: str) -> None:
    tower = tower_of(tiny_checkpoint, -2, kind).cuda()
    before = tower(tiles().cuda())
    ready_tower(tower)
    assert any(isinstance(module, QuickGelu) for module in tower.modules())
    torch.testing.assert_close(tower(tiles().cuda()), before, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no kernels for bfloat16")
def test_half_precision_is_packed_and_stays_close(tiny_checkpoint: Path) -> None:
    tower = tower_of(tiny_checkpoint, -2, "CLIP")
    exact = tower(tiles())
    ready_tower(tower.bfloat16())
    assert any(isinstance(module, PackedLinear) for module in tower.modules())
    torch.testing.assert_close(tower(tiles()).float(), exact, atol=0.1, rtol=0.1)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "expected"), [("CLIP", 2), ("CLIP-S2", 4), ("SigLIP", 2)])
def test_the_callback_runs_before_every_layer(tiny_checkpoint: Path, kind: str, expected: int) -> None:
    """The tiny towers have three layers, of which layer -2 needs two, and S2 runs its tower once per scale."""
    tower, calls = tower_of(tiny_checkpoint, -2, kind), list[None]()
    ready_tower(tower)
    call_before_layers(tower, lambda: calls.append(None))
    tower(tiles(2 * IMAGE_SIZE if kind == "CLIP-S2" else IMAGE_SIZE))
    assert len(calls) == expected
