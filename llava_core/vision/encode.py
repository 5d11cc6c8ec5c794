"""Prepared pictures through a tower, each different picture once. Knows nothing about replicas or prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_core.lru import LruCache
from llava_core.types import ImageFeatures, PreparedImage
from llava_core.vision.towers import VisionTower


@torch.inference_mode()
def encode_images(
    tower: VisionTower, images: Sequence[PreparedImage], cache: LruCache[Tensor] | None = None
) -> list[ImageFeatures]:
    """Features of every picture, in order; those with equal digests are run once, and not at all if they are cached.

    A cache belongs to one tower. Where a picture fails, nothing of what was encoded with it is kept. Features in a
    cache are shared, and torch refuses to change them in place outside of inference mode.
    """
    cache = LruCache(0) if cache is None else cache
    distinct = {image.digest: image for image in images}
    known = {digest: rows for digest in distinct if (rows := cache.get(digest)) is not None}
    new = {digest: _encode(tower, image) for digest, image in distinct.items() if digest not in known}
    for digest, rows in new.items():
        # What is no number may be this once only; the engine refuses it.
        if bool(torch.isfinite(rows).all()):
            cache.put(digest, rows, rows.untyped_storage().nbytes())
    features = known | new
    return [ImageFeatures(image.digest, features[image.digest], image.size) for image in images]


def _encode(tower: VisionTower, image: PreparedImage) -> Tensor:
    """The rows of all tiles of one picture, in memory of their own.

    A picture runs without others: in a batch, the last bits may depend on its company, and whether it is cached would
    show. Its tiles are a batch, whoever asks.
    """
    # Copied: the tiles may be read-only, which torch warns of.
    tiles = torch.tensor(image.tiles, device=tower.model.device)
    # Cloned: a view would keep more than these rows, such as the class token's.
    features: Tensor = tower(tiles)
    return features.flatten(0, 1).cpu().clone(memory_format=torch.contiguous_format)
