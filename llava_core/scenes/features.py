"""The frozen tower's features of every cached picture, computed once for both LLaVA stages.

Knows nothing about language.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from llava_core.scenes.cache import SceneCache
from llava_core.scenes.resuming import write_whole
from llava_core.vision.clip import ClipTower

_BATCH = 256


@torch.inference_mode()
def open_features(folder: Path, cache: SceneCache, tower: ClipTower) -> npt.NDArray[np.float16]:
    """Open the features in `folder`, float16 (num_scenes, image_tokens, vision_hidden), computing missing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / "features.f16", folder / "encoded.json"
    start = int(json.loads(done.read_text())) if done.exists() else 0
    shape = (len(cache.tiles), tower.config.tokens_per_tile, tower.config.hidden_size)
    features: npt.NDArray[np.float16] = np.memmap(path, np.float16, "r+" if path.exists() else "w+", shape=shape)
    device = tower.model.device
    firsts = range(start, len(cache.tiles), _BATCH)
    for first in tqdm(firsts, initial=start // _BATCH, total=len(cache.tiles) // _BATCH, unit="batch", desc="encode"):
        tiles = torch.from_numpy(np.array(cache.tiles[first : first + _BATCH])).to(device)
        # bfloat16 is three times faster here, and the tower was pretrained in it.
        with torch.autocast(device.type, torch.bfloat16):
            rows = tower(tiles)
        features[first : first + _BATCH] = rows.to("cpu", torch.float16).numpy()
        write_whole(done, str(first + _BATCH))
    return features
