"""Encoding pictures: order is kept, equal pictures run once or come from the cache, each result owns its memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_core.checkpoints.load import LoadOptions, load_tower
from llava_core.lru import LruCache
from llava_core.types import ImageFeatures, PreparedImage, Size
from llava_core.vision.clip import ClipTower
from llava_core.vision.encode import encode_images
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, VISION_HIDDEN


@pytest.fixture
def tower(tiny_checkpoint: Path) -> ClipTower:
    return load_tower(tiny_checkpoint, LoadOptions(dtype="float32"))


def picture(seed: int, num_tiles: int = 1) -> PreparedImage:
    tiles = np.random.default_rng(seed).integers(0, 256, (num_tiles, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    return PreparedImage(f"digest-{seed}", Size(IMAGE_SIZE, IMAGE_SIZE), tiles)


def watched(tower: ClipTower) -> list[int]:
    """Records the number of tiles in every later run of the tower."""
    runs: list[int] = []
    tower.register_forward_pre_hook(lambda _module, inputs: runs.append(len(inputs[0])))
    return runs


def test_features_are_in_the_order_of_the_pictures(tower: ClipTower) -> None:
    pictures = [picture(2), picture(0), picture(1)]
    together = encode_images(tower, pictures)
    assert [image.digest for image in together] == ["digest-2", "digest-0", "digest-1"]
    for image, alone in zip(together, pictures, strict=True):
        # Bit-identical whatever else the request holds, so answers are the same with and without a cache.
        assert torch.equal(image.features, encode_images(tower, [alone])[0].features)


def test_equal_pictures_are_encoded_once(tower: ClipTower) -> None:
    runs = watched(tower)
    same = encode_images(tower, [picture(0), picture(1), picture(0)])
    assert runs == [1, 1]
    assert torch.equal(same[0].features, same[2].features)


def test_without_pictures_the_tower_does_not_run(tower: ClipTower) -> None:
    tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    assert encode_images(tower, []) == []


def test_the_tiles_of_a_picture_are_joined(tower: ClipTower) -> None:
    first, second = encode_images(tower, [picture(0, 3), picture(1)])
    assert first.features.shape == (3 * IMAGE_TOKENS, VISION_HIDDEN)
    assert second.features.shape == (IMAGE_TOKENS, VISION_HIDDEN)


def test_a_result_does_not_keep_the_batch_alive(tower: ClipTower) -> None:
    for image in encode_images(tower, [picture(0), picture(1)]):
        assert image.features.untyped_storage().nbytes() == image.features.numel() * image.features.element_size()
        assert not image.features.requires_grad
        assert image.features.is_contiguous()


def test_a_cached_picture_is_not_rerun_and_has_the_same_features(tower: ClipTower) -> None:
    runs, cache = watched(tower), LruCache[ImageFeatures](10**6)
    first = encode_images(tower, [picture(0, 3), picture(1)], cache)
    again = encode_images(tower, [picture(1), picture(2), picture(0, 3)], cache)
    assert runs == [3, 1, 1]
    assert torch.equal(again[0].features, first[1].features)
    assert torch.equal(again[2].features, first[0].features)
    for image, alone in zip(again, (picture(1), picture(2), picture(0, 3)), strict=True):
        assert torch.equal(image.features, encode_images(tower, [alone])[0].features)
    assert (cache.num_hits, cache.num_misses) == (2, 3)
    assert cache.num_bytes == sum(each.features.nbytes for each in (*first, again[1]))


def test_pictures_with_equal_tiles_keep_their_own_sizes(tower: ClipTower) -> None:
    cache = LruCache[ImageFeatures](10**6)
    small, large = (replace(picture(0), size=Size(side, side)) for side in (5, 500))
    sizes = [encode_images(tower, [image], cache)[0].size for image in (small, large)]
    assert sizes == [Size(5, 5), Size(500, 500)]


def test_a_failed_picture_leaves_the_cache_unchanged(tower: ClipTower) -> None:
    cache = LruCache[ImageFeatures](10**6)
    odd = PreparedImage("odd", Size(5, 5), np.zeros((1, 5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="doesn't match model"):
        encode_images(tower, [picture(0), odd], cache)
    assert cache.num_bytes == 0
    assert cache.get("digest-0") is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_features_are_returned_but_never_cached(tower: ClipTower, poison: float) -> None:
    cache = LruCache[ImageFeatures](10**6)

    def spoil(_module: object, _inputs: object, features: torch.Tensor) -> torch.Tensor:
        spoilt = features.clone()
        spoilt[0, -1, -1] = poison
        return spoilt

    hook = tower.register_forward_hook(spoil)
    (bad,) = encode_images(tower, [picture(0)], cache)
    hook.remove()
    assert not bad.features.isfinite().all()
    (good,) = encode_images(tower, [picture(0)], cache)
    assert torch.equal(good.features, encode_images(tower, [picture(0)])[0].features)


def test_cached_features_cannot_be_changed_in_place(tower: ClipTower) -> None:
    cache = LruCache[ImageFeatures](10**6)
    (image,) = encode_images(tower, [picture(0)], cache)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        image.features.zero_()


def test_read_only_tiles_are_encoded(tower: ClipTower) -> None:
    image = picture(0)
    image.tiles.flags.writeable = False
    assert len(encode_images(tower, [image])) == 1
