"""Features on disk equal those the tower computes, and an interrupted computation resumes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llava_core.checkpoints.load import LoadOptions, load_tower
from llava_core.scenes import features as features_module
from llava_core.scenes.cache import CacheSpec, SceneCache, open_cache
from llava_core.scenes.features import open_features
from llava_core.vision.clip import ClipTower
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE, VISION_HIDDEN

SPEC = CacheSpec(seed=1, num_scenes=6, size=IMAGE_SIZE, patch=PATCH_SIZE)


@pytest.fixture
def tower(tiny_checkpoint: Path) -> ClipTower:
    return load_tower(tiny_checkpoint, LoadOptions(dtype="float32"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SceneCache:
    monkeypatch.setattr(features_module, "_BATCH", 2)
    return open_cache(tmp_path / "pictures", SPEC)


def test_features_equal_the_towers(tmp_path: Path, cache: SceneCache, tower: ClipTower) -> None:
    features = open_features(tmp_path / "features", cache, tower)
    assert (features.shape, features.dtype) == ((6, IMAGE_TOKENS, VISION_HIDDEN), np.float16)
    with torch.inference_mode():
        expected = tower(torch.from_numpy(np.array(cache.tiles))).numpy()
    # Computed in bfloat16, whose eight-bit rounding errors add up over the layers to about a hundredth of the features'
    # spread.
    error = np.sqrt(np.mean((features.astype(np.float32) - expected) ** 2))
    assert error < 0.02 * expected.std()


def test_an_interrupted_computation_resumes(tmp_path: Path, cache: SceneCache, tower: ClipTower) -> None:
    expected = np.array(open_features(tmp_path / "features", cache, tower))
    features = open_features(tmp_path / "features", cache, tower)
    features[2:] = 0
    encoded = tmp_path / "features" / "encoded.json"
    encoded.write_text("2")
    (tmp_path / "before").hardlink_to(encoded)
    assert (open_features(tmp_path / "features", cache, tower) == expected).all()
    # Replaced, not overwritten in place.
    assert (encoded.read_text(), (tmp_path / "before").read_text()) == ("6", "2")


def test_finished_features_do_not_run_the_tower(tmp_path: Path, cache: SceneCache, tower: ClipTower) -> None:
    open_features(tmp_path / "features", cache, tower)
    tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    open_features(tmp_path / "features", cache, tower)
