"""Stage 0 of the default model: the tower learns to see by naming, for each patch, the object or character it shows.

Dense labels teach a small tower far faster than answers do. The heads are discarded; what remains is a CLIP-type tower
whose patch features encode shape, colour, size, place and characters. Knows nothing about language.
"""

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_core.images.preprocess import PreprocessConfig
from llava_core.scenes.cache import LABELS, SceneCache
from llava_core.vision.clip import normalise

# Most patches of a picture show nothing; characters are the rarest and the hardest.
_EMPTY = 2.0
_WEIGHTS = {"centre": 2.0, "left_character": 4.0, "right_character": 4.0}


class PatchExample(TypedDict):
    """`tiles`: uint8 (size, size, 3). `labels`: uint8 (patches, len(LABELS))."""

    tiles: Tensor
    labels: Tensor


class PatchDataset(Dataset[PatchExample]):
    """Tiles and patch labels of a cache, in order."""

    def __init__(self, cache: SceneCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache.tiles)

    def __getitem__(self, index: int) -> PatchExample:
        return {
            "tiles": torch.from_numpy(np.array(self.cache.tiles[index])),
            "labels": torch.from_numpy(np.array(self.cache.labels[index])),
        }


class PatchNamer(nn.Module):
    """A CLIP tower with one linear head over its patch features, split into the facts of LABELS."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel._from_config(config, attn_implementation="eager")
        _init_positions(self.tower, config)
        self.head = nn.Linear(config.hidden_size, sum(LABELS.values()))
        self.preprocess = PreprocessConfig(size=self.tower.config.image_size)

    def forward(self, tiles: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`tiles` uint8 (batch, size, size, 3), `labels` uint8 (batch, patches, len(LABELS)) → loss and accuracy."""
        pixels = normalise(tiles, self.preprocess)
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = self.head(hidden).float()
        total = torch.zeros((), device=logits.device)
        hits = []
        for column, (name, part) in enumerate(zip(LABELS, logits.split(list(LABELS.values()), -1), strict=True)):
            target = labels[..., column].long()
            losses = nn.functional.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="none")
            shown = target.flatten() > 0
            empty = losses[~shown].mean()
            total = total + _WEIGHTS.get(name, 1.0) * (_EMPTY * empty + losses[shown].sum() / shown.sum().clamp(min=1))
            hits.append((part.argmax(-1).flatten()[shown] == target.flatten()[shown]).float().mean())
        return {"loss": total / len(LABELS), "hits": torch.stack(hits)}


@torch.no_grad()
def _init_positions(tower: CLIPVisionModel, config: CLIPVisionConfig) -> None:
    """Initialise position embeddings to sine-cosine on the patch grid (as in MoCo v3), as large as patch embeddings.

    CLIP's own initialisation, noise of 0.02, is drowned out by pixels: for its first thousand steps the tower would not
    know where a patch is.
    """
    assert isinstance(config.image_size, int)
    assert isinstance(config.patch_size, int)
    side, quarter = config.image_size // config.patch_size, config.hidden_size // 4
    frequencies = 100.0 ** (-torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None, :].expand(side, side, -1)
    grid = torch.cat([rows, columns], -1).flatten(0, 1)
    tower.embeddings.position_embedding.weight[1:] = 0.5 * grid
