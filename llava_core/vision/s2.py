"""The CLIP-S2 tower: one picture at several scales through one CLIP, joined feature-wise (arXiv 2403.13043).

A scale larger than the tower's own size is cut into squares of that size; their features are reassembled and averaged
down to the smallest scale's grid. So the number of image tokens stays the same, and features grow with the scales.
Knows nothing about files: the caller passes the scales from the configuration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.kernels.attention import NAME as DENSE
from llava_core.vision.clip import ClipTower, normalise


class ClipS2Tower(ClipTower):
    """A CLIP tower read at several scales; its weights and their names are those of `ClipTower`.

    `scales` are picture sides in pixels (LLaVA's `s2_scales`): the smallest is the tower's own, the others multiples of
    it. Tiles have the largest, and `config.hidden_size` counts the features of all scales.
    """

    def __init__(
        self, config: VisionConfig, preprocess: PreprocessConfig, scales: Sequence[int], *, attention: str = DENSE
    ) -> None:
        _check(config, preprocess, scales)
        super().__init__(config, preprocess, attention=attention)
        self.scales = tuple(sorted(scales))

    def forward(self, tiles: Tensor) -> Tensor:
        """`tiles` uint8 (num_tiles, largest, largest, 3) → features (num_tiles, patches_per_side², hidden_size).

        The last dimension holds the scales one after the other, smallest first.
        """
        pixels = normalise(tiles, self.preprocess)
        return torch.cat([self._encode_scale(pixels, scale) for scale in self.scales], -1)

    def _encode_scale(self, pixels: Tensor, scale: int) -> Tensor:
        """float32 (N, 3, H, W) → (N, patches_per_side², width of one scale)."""
        per_side = scale // self.config.image_size
        scaled = functional.interpolate(pixels, size=(scale, scale), mode="bicubic")
        squares = split_squares(scaled, per_side).to(self.model.dtype)
        hidden = self.model(pixel_values=squares, output_hidden_states=True).hidden_states[self.config.select_layer]
        grids = hidden[:, 1:].transpose(1, 2).unflatten(2, (self.config.patches_per_side,) * 2)
        # Averaged in float32: in half precision the sums would round.
        pooled = functional.avg_pool2d(merge_squares(grids, per_side).float(), per_side)
        return pooled.flatten(2).transpose(1, 2).to(self.model.dtype)


def split_squares(images: Tensor, per_side: int) -> Tensor:
    """(N, C, per_side * h, per_side * w) → (N * per_side², C, h, w): each image's squares row by row."""
    rows: Tensor = images.unflatten(3, (per_side, -1)).unflatten(2, (per_side, -1))
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def merge_squares(squares: Tensor, per_side: int) -> Tensor:
    """The inverse of `split_squares`: (N * per_side², C, h, w) → (N, C, per_side * h, per_side * w)."""
    rows: Tensor = squares.unflatten(0, (-1, per_side, per_side))
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _check(config: VisionConfig, preprocess: PreprocessConfig, scales: Sequence[int]) -> None:
    size = config.image_size
    if not scales or min(scales) != size or any(scale % size for scale in scales) or len(set(scales)) < len(scales):
        raise CheckpointError(
            f"s2_scales are {list(scales)}; they must differ, begin with the tower's own {size} pixels and be "
            "multiples of it"
        )
    if preprocess.size != max(scales):
        raise CheckpointError(
            f"s2_scales reach {max(scales)} pixels, but pictures are preprocessed to {preprocess.size}"
        )
    if config.select_feature != "patch":
        raise CheckpointError(
            f"mm_vision_select_feature is {config.select_feature!r}; with s2 only 'patch' is possible, "
            "since a class feature has no place in the grid"
        )
    width = config.architecture["hidden_size"]
    if config.hidden_size != width * len(scales):
        raise CheckpointError(
            f"the tower's {width} features at {len(scales)} s2_scales make {width * len(scales)}, "
            f"but hidden_size is {config.hidden_size}"
        )
