"""The BioViL-T tower of RaDialog: uint8 radiographs in, one feature vector per patch out (arXiv 2301.04558).

A ResNet's feature map, narrowed by a 1x1 convolution, next to features of the change since a prior picture; without a
prior, a learned vector replaces them. Knows nothing about projectors or how radiographs become tiles
(`images/biovil.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.biovil import BioVilPreprocessConfig
from llava_core.vision.biovil_pooler import TemporalPooler
from llava_core.vision.biovil_resnet import ResNetTrunk

STRIDE = 32


@dataclass(frozen=True)
class BioVilTArchitecture:
    """Sizes of the network; the defaults are those of the only released one: a ResNet-50 with a pooler of width 256."""

    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    trunk_width: int = 64
    width: int = 256
    num_heads: int = 8
    num_blocks: int = 3

    def __post_init__(self) -> None:
        if len(self.depths) != 4 or min(*self.depths, self.trunk_width, self.num_heads, self.num_blocks) < 1:
            raise CheckpointError(f"vision_config: BioViL-T needs four stages and positive sizes: {self}")
        if self.width < 1 or self.width % 4 or self.width % self.num_heads:
            raise CheckpointError(f"vision_config: width must be a multiple of 4 and of num_heads: {self}")


class BioVilTTower(nn.Module):
    """BioViL-T's image encoder up to its patch embeddings: static features, then difference features."""

    def __init__(self, config: VisionConfig, preprocess: BioVilPreprocessConfig) -> None:
        super().__init__()
        architecture = read_architecture(config)
        if preprocess.size != config.image_size:
            raise CheckpointError(
                f"BioViL-T takes {config.image_size} pixels, but pictures are preprocessed to {preprocess.size}"
            )
        self.config = config
        self.preprocess = preprocess
        self.model = BioVilTModel(architecture, config.patches_per_side)

    def forward(self, tiles: Tensor, prior_tiles: Tensor | None = None) -> Tensor:
        """`tiles` uint8 (num_tiles, size, size, 3) → features (num_tiles, patches_per_side², hidden_size).

        `prior_tiles` are earlier pictures of the same patients, of the same shape. Patches are in row order.
        """
        prior = None if prior_tiles is None else self._to_pixels(prior_tiles)
        features: Tensor = self.model(self._to_pixels(tiles), prior)
        return features.flatten(2).transpose(1, 2)

    def _to_pixels(self, tiles: Tensor) -> Tensor:
        return (tiles.permute(0, 3, 1, 2).float() / 255).to(self.model.dtype)


class BioVilTModel(nn.Module):
    """Pixels in, patch embeddings out; `grid` is the side of the patch grid."""

    def __init__(self, architecture: BioVilTArchitecture, grid: int) -> None:
        super().__init__()
        width = architecture.width
        self.trunk = ResNetTrunk(architecture.depths, architecture.trunk_width)
        self.narrow = nn.Conv2d(self.trunk.num_channels, width, 1, bias=False)
        self.missing_prior = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.pooler = TemporalPooler(width, grid, num_heads=architecture.num_heads, num_blocks=architecture.num_blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.missing_prior.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.missing_prior.dtype

    def forward(self, pixels: Tensor, prior: Tensor | None = None) -> Tensor:
        """(N, 3, H, W) between 0 and 1, with priors of the same shape or none → (N, 2 * width, H / 32, W / 32)."""
        if prior is None:
            static = self.narrow(self.trunk(pixels))
            difference = self.missing_prior.expand_as(static)
        else:
            assert prior.shape == pixels.shape, f"pictures {pixels.shape}, priors {prior.shape}"
            static, before = self.narrow(self.trunk(torch.cat([pixels, prior]))).chunk(2)
            difference = self.pooler(static, before)
        return torch.cat([static, difference], 1)


def read_architecture(config: VisionConfig) -> BioVilTArchitecture:
    """The network's sizes. Raises CheckpointError for unknown fields or sizes that contradict each other."""
    given = {name: value for name, value in config.architecture.items() if name != "model_type"}
    known = {field.name for field in fields(BioVilTArchitecture)}
    if unknown := sorted(set(given) - known):
        raise CheckpointError(
            f"vision_config: BioViL-T has no {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    if "depths" in given:
        given["depths"] = tuple(given["depths"])
    architecture = BioVilTArchitecture(**given)
    if config.image_size % STRIDE:
        raise CheckpointError(f"BioViL-T takes multiples of {STRIDE} pixels, not {config.image_size}")
    if config.patch_size != STRIDE or config.hidden_size != 2 * architecture.width:
        raise CheckpointError(
            f"BioViL-T has patches of {STRIDE} pixels and {2 * architecture.width} features; "
            f"the configuration says {config.patch_size} and {config.hidden_size}"
        )
    if config.select_feature != "patch":
        raise CheckpointError(
            f"mm_vision_select_feature is {config.select_feature!r}, but BioViL-T has no class token; "
            "only 'patch' is possible"
        )
    return architecture
