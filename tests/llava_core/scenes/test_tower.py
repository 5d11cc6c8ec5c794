"""The default model's tower accepts larger tiles with the same weights."""

import torch
from torch import nn

from llava_core.scenes.tower import new_tower, resize_tower


def test_resizing_interpolates_positions_and_keeps_everything_else() -> None:
    torch.manual_seed(0)
    tower = new_tower(48, 16)
    larger = resize_tower(tower, 96)
    before, after = (each.model.embeddings.position_embedding.weight.detach() for each in (tower, larger))
    assert torch.equal(after[0], before[0])
    grid = before[1:].T.reshape(1, -1, 3, 3)
    expected = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.allclose(after[1:].T.reshape(1, -1, 6, 6), expected, atol=1e-6)
    old, new = tower.state_dict(), larger.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old if "position_embedding" not in name)
    assert larger(torch.zeros(1, 96, 96, 3, dtype=torch.uint8)).shape == (1, 36, 192)


def test_resizing_to_the_same_size_changes_nothing() -> None:
    tower = new_tower(48, 16)
    tiles = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    assert torch.equal(resize_tower(tower, 48)(tiles), tower(tiles))
