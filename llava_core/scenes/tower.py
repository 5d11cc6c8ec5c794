"""The default model's tower: its shape, and the same tower for larger tiles. Knows nothing about training or data."""

from typing import Any

import torch
from transformers import CLIPVisionConfig

from llava_core.config import read_llava_hf_config
from llava_core.images.preprocess import PreprocessConfig
from llava_core.vision.clip import ClipTower


def tower_config(size: int, patch: int) -> CLIPVisionConfig:
    """6 layers of width 192; `size` and `patch` are the sides of a tile and of a patch in pixels."""
    return CLIPVisionConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        hidden_act="quick_gelu",
    )


def tower_words(size: int, patch: int) -> dict[str, Any]:
    """The tower as in config.json: fields that differ from CLIP's defaults, and fields that our reader requires."""
    config = tower_config(size, patch)
    named = {"hidden_size": config.hidden_size, "image_size": size, "patch_size": patch}
    return config.to_diff_dict() | named


def new_tower(size: int, patch: int) -> ClipTower:
    """An untrained tower."""
    words = {"vision_config": tower_words(size, patch), "vision_feature_layer": -1, "text_config": {}}
    return ClipTower(read_llava_hf_config(words).vision, PreprocessConfig(size=size), attention="eager")


@torch.no_grad()
def resize_tower(tower: ClipTower, size: int) -> ClipTower:
    """The same tower for tiles of `size` pixels: patches unchanged, positions interpolated over the larger grid."""
    larger = new_tower(size, tower.config.patch_size)
    weights = tower.model.state_dict()
    grid = torch.empty(1, larger.config.tokens_per_tile + 1, tower.config.hidden_size)
    positions = tower.model.embeddings.interpolate_pos_encoding(grid, size, size)
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    larger.model.load_state_dict(weights | {name: positions[0]})
    return larger
