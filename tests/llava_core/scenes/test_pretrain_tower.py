"""Tower pretraining: usable losses, distinct initial positions, and a valid CLIP configuration."""

import pytest
import torch
from transformers import CLIPVisionConfig

from llava_core.scenes.cache import LABELS, SceneCache
from llava_core.scenes.pretrain_tower import PatchDataset, PatchNamer
from llava_core.scenes.tower import tower_config


@pytest.fixture
def namer() -> PatchNamer:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        image_size=64,
        patch_size=16,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return PatchNamer(config)


def test_a_few_steps_lower_the_loss(namer: PatchNamer, scene_cache: SceneCache) -> None:
    dataset = PatchDataset(scene_cache)
    assert len(dataset) == len(scene_cache.tiles)
    batch = {name: torch.stack([dataset[index][name] for index in range(8)]) for name in ("tiles", "labels")}
    optimizer = torch.optim.AdamW(namer.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        out = namer(**batch)
        losses.append(out["loss"].item())
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert out["hits"].shape == (len(LABELS),)


def test_every_patch_starts_with_a_distinct_position(namer: PatchNamer) -> None:
    positions = namer.tower.embeddings.position_embedding.weight[1:]
    distances = torch.cdist(positions, positions) + torch.eye(len(positions)) * 1e9
    assert distances.min() > 0.1


def test_a_batch_without_characters_still_has_a_loss(namer: PatchNamer) -> None:
    tiles = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    labels = torch.zeros(2, 16, len(LABELS), dtype=torch.uint8)
    assert torch.isfinite(namer(tiles, labels)["loss"])


def test_the_default_towers_configuration_is_valid() -> None:
    config = tower_config(128, 16)
    assert config.image_size % config.patch_size == 0
    assert config.hidden_size % config.num_attention_heads == 0
