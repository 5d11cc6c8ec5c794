"""Prepared pictures through a tower, each different picture once. Knows nothing about replicas or prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from llava_core.lru import LruCache
from llava_core.types import ImageFeatures, PreparedImage
from llava_core.vision.towers import VisionTower

Kept = TypeVar("Kept")


def encode_images(
    tower: VisionTower, images: Sequence[PreparedImage], cache: LruCache[ImageFeatures] | None = None
) -> list[ImageFeatures]:
    """Features of every picture, in order; those with equal digests are run once, and not at all if they are cached.

    Features in a cache are shared, and torch refuses to change them in place outside of inference mode.
    """
    features = encode_through(tower, images, LruCache(0) if cache is None else cache, lambda made: made)
    return [replace(features[image.digest], size=image.size) for image in images]


@torch.inference_mode()
def encode_through(
    tower: VisionTower,
    images: Sequence[PreparedImage],
    cache: LruCache[Kept],
    keep: Callable[[ImageFeatures], Kept],
) -> dict[str, Kept]:
    """What the cache has of each different picture, by its digest, and what `keep` makes of the features of the others.

    A cache belongs to one tower. Where a picture fails, nothing of what was encoded with it is kept. Pictures with
    equal tiles may have been cut from different sizes: whoever asks puts theirs in place.
    """
    distinct = {image.digest: image for image in images}
    known = {digest: kept for digest in distinct if (kept := cache.get(digest)) is not None}
    rows = {digest: _encode(tower, image) for digest, image in distinct.items() if digest not in known}
    new = {digest: keep(ImageFeatures(digest, each, distinct[digest].size)) for digest, each in rows.items()}
    for digest, each in rows.items():
        # What is no number may be this once only; the engine refuses it.
        if bool(torch.isfinite(each).all()):
            cache.put(digest, new[digest], each.untyped_storage().nbytes())
    return known | new


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
