"""The SigLIP tower: uint8 tiles in, the features of one hidden layer out; there is no class token to drop.

Normalises here, as the CLIP tower does. Knows nothing about projectors, prompts or caches.
"""

from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from llava_core.config import VisionConfig
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.kernels.attention import NAME as DENSE
from llava_core.vision.clip import normalise


class SiglipTower(nn.Module):
    """A SigLIP vision transformer read at its select layer. `patch` selects every position: all of them are patches."""

    def __init__(self, config: VisionConfig, preprocess: PreprocessConfig, *, attention: str = DENSE) -> None:
        super().__init__()
        if config.select_feature != "patch":
            raise CheckpointError(
                f"mm_vision_select_feature is {config.select_feature!r}, but a SigLIP tower has no class token; "
                "only 'patch' is possible"
            )
        self.config = config
        self.model = SiglipVisionModel._from_config(
            SiglipVisionConfig(**dict(config.architecture)), attn_implementation=attention
        )
        self.preprocess = preprocess

    def forward(self, tiles: Tensor) -> Tensor:
        """`tiles` uint8 (num_tiles, size, size, 3) → features (num_tiles, patches_per_side², hidden_size)."""
        pixels = normalise(tiles, self.preprocess).to(self.model.dtype)
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        selected: Tensor = states[self.config.select_layer]
        return selected
