"""Runs prepared pictures through a tower, each distinct picture once. Knows nothing about replicas or prompts."""

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
    """Features of every picture, in order; pictures with equal digests are encoded once, and cached ones not at all.

    Cached features are shared; torch refuses to modify them in place outside inference mode.
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
    """The cached value of each distinct picture, by digest, or else the result of `keep` for its features.

    A cache belongs to one tower. If a picture fails, none of the features encoded with it are cached. Pictures with
    equal tiles may have been cut from different sizes, so the caller sets each picture's own.
    """
    distinct = {image.digest: image for image in images}
    known = {digest: kept for digest in distinct if (kept := cache.get(digest)) is not None}
    rows = {digest: _encode(tower, image) for digest, image in distinct.items() if digest not in known}
    new = {digest: keep(ImageFeatures(digest, each, distinct[digest].size)) for digest, each in rows.items()}
    for digest, each in rows.items():
        # Non-finite values may be a one-off, so they are not cached; the engine refuses them.
        if bool(torch.isfinite(each).all()):
            cache.put(digest, new[digest], each.untyped_storage().nbytes())
    return known | new


def _encode(tower: VisionTower, image: PreparedImage) -> Tensor:
    """The rows of all tiles of one picture, in memory of their own.

    Each picture runs alone: in a batch the last bits may depend on the other pictures, so cached and fresh features
    would differ. A picture's own tiles always form one batch.
    """
    # Copied: the tiles may be read-only, which makes torch warn.
    tiles = torch.tensor(image.tiles, device=tower.model.device)
    # Cloned: a view would keep more than these rows in memory, such as the class token's.
    features: Tensor = tower(tiles)
    return features.flatten(0, 1).cpu().clone(memory_format=torch.contiguous_format)
