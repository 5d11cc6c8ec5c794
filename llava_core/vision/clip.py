"""The CLIP tower: uint8 tiles in, the features of one hidden layer out.

Normalises here, so tiles travel as uint8. Knows nothing about projectors, prompts or caches.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_core.config import VisionConfig
from llava_core.images.preprocess import PreprocessConfig
from llava_core.kernels.attention import NAME as DENSE


class ClipTower(nn.Module):
    """A CLIP vision transformer cut off at its select layer."""

    def __init__(self, config: VisionConfig, preprocess: PreprocessConfig, *, attention: str = DENSE) -> None:
        super().__init__()
        self.config = config
        self.model = CLIPVisionModel._from_config(
            CLIPVisionConfig(**dict(config.architecture)), attn_implementation=attention
        )
        self.preprocess = preprocess

    def forward(self, tiles: Tensor) -> Tensor:
        """`tiles` uint8 (num_tiles, size, size, 3) → features (num_tiles, num_image_tokens, hidden_size)."""
        pixels = normalise(tiles, self.preprocess).to(self.model.dtype)
        hidden = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[self.config.select_layer]
        selected: Tensor = hidden if self.config.select_feature == "cls_patch" else hidden[:, 1:]
        return selected


def normalise(tiles: Tensor, config: PreprocessConfig) -> Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W): scaled to 0..1, then by the tower's mean and standard deviation."""
    mean = torch.tensor(config.mean, device=tiles.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=tiles.device).view(3, 1, 1)
    return (tiles.permute(0, 3, 1, 2).float() / 255 - mean) / std
