"""Prepared pictures through a tower, each different picture once. Knows nothing about replicas, caches or prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from llava_core.types import ImageFeatures, PreparedImage
from llava_core.vision.towers import VisionTower


@torch.inference_mode()
def encode_images(tower: VisionTower, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
    """Features of every picture, in order; pictures with equal digests are run once, all of them in one batch."""
    distinct = {image.digest: image for image in images}
    if not distinct:
        return []
    tiles = torch.from_numpy(np.concatenate([image.tiles for image in distinct.values()]))
    features = tower(tiles.to(tower.model.device)).cpu()
    counts = [len(image.tiles) for image in distinct.values()]
    # Cloned: a view would keep, and hand over, the whole batch.
    rows = {digest: part.flatten(0, 1).clone() for digest, part in zip(distinct, features.split(counts), strict=True)}
    return [ImageFeatures(image.digest, rows[image.digest], image.size) for image in images]
