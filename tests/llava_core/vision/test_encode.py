"""Encoding pictures: order kept, equal pictures run once, and each result owns its memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llava_core.checkpoints.load import LoadOptions, load_tower
from llava_core.types import PreparedImage, Size
from llava_core.vision.clip import ClipTower
from llava_core.vision.encode import encode_images
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, VISION_HIDDEN


@pytest.fixture
def tower(tiny_checkpoint: Path) -> ClipTower:
    return load_tower(tiny_checkpoint, LoadOptions(dtype="float32"))


def picture(seed: int, num_tiles: int = 1) -> PreparedImage:
    tiles = np.random.default_rng(seed).integers(0, 256, (num_tiles, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    return PreparedImage(f"digest-{seed}", Size(IMAGE_SIZE, IMAGE_SIZE), tiles)


def test_features_come_in_the_order_of_the_pictures(tower: ClipTower) -> None:
    pictures = [picture(2), picture(0), picture(1)]
    together = encode_images(tower, pictures)
    assert [image.digest for image in together] == ["digest-2", "digest-0", "digest-1"]
    for image, alone in zip(together, pictures, strict=True):
        torch.testing.assert_close(image.features, encode_images(tower, [alone])[0].features)


def test_equal_pictures_are_run_once(tower: ClipTower) -> None:
    batches: list[int] = []
    tower.register_forward_pre_hook(lambda _module, inputs: batches.append(len(inputs[0])))
    same = encode_images(tower, [picture(0), picture(1), picture(0)])
    assert batches == [2]
    assert torch.equal(same[0].features, same[2].features)


def test_no_pictures_run_nothing(tower: ClipTower) -> None:
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
