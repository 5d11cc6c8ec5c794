"""Training pictures drawn once and kept on disk: uint8 tiles as a tower reads them, and what each patch of them shows.

Scene `i` of a seed is always the same scene, so only pixels and patch labels are stored; questions are regenerated from
the scene. Knows nothing about models or tokenizers.
"""

import functools
import logging
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from llava_core.images.preprocess import PreprocessConfig, preprocess
from llava_core.scenes.draw import character_centres, compress_jpeg, draw_scene
from llava_core.scenes.resuming import claim, write_whole
from llava_core.scenes.scene import Scene, SceneObject, sample_scene
from llava_core.scenes.vocabulary import COLOURS, DIGITS, LETTERS, PLACES, SHAPES, SIZES

logger = logging.getLogger(__name__)

# One column per fact about a patch. 0 always means "nothing here".
LABELS = {
    "centre": 2,
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "size": 1 + len(SIZES),
    "place": 1 + sum(len(row) for row in PLACES),
    "left_character": 1 + len(LETTERS + DIGITS),
    "right_character": 1 + len(LETTERS + DIGITS),
}
_CHUNK = 256


@dataclass(frozen=True)
class CacheSpec:
    """A cache's contents. `size` and `patch` are the tower's tile side and patch side in pixels; `with_text` and
    `random_letters` as in sample_scene."""

    seed: int
    num_scenes: int
    size: int
    patch: int
    with_text: float = 0.42
    random_letters: float = 0.34

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.size // self.patch


@dataclass(frozen=True)
class SceneCache:
    """`tiles` is uint8 (num_scenes, size, size, 3); `labels` is uint8 (num_scenes, grid * grid, len(LABELS))."""

    spec: CacheSpec
    tiles: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def scene(self, index: int) -> Scene:
        """The scene behind tile `index`."""
        return training_scene(self.spec, index)


def training_scene(spec: CacheSpec, index: int) -> Scene:
    """Scene `index` of a cache. One in twelve is large (500 to 1,500 pixels), the others 64 to 500."""
    rng = random.Random(f"{spec.seed}:{index}")
    longest_side = (500, 1500) if rng.random() < 1 / 12 else (64, 500)
    return sample_scene(rng, longest_side=longest_side, with_text=spec.with_text, random_letters=spec.random_letters)


def render_training_picture(scene: Scene) -> Image.Image:
    """The scene's picture; three in ten are compressed as JPEG first."""
    picture = draw_scene(scene)
    rng = random.Random(scene.seed + 1)
    return compress_jpeg(picture, rng.randint(60, 95)) if rng.random() < 0.3 else picture


def open_cache(folder: Path, spec: CacheSpec) -> SceneCache:
    """Open the cache in `folder`, drawing what is missing. Raises LlavaError when it holds one of another spec."""
    claim(folder, **asdict(spec))
    shapes = {"tiles": (spec.size, spec.size, 3), "labels": (spec.grid**2, len(LABELS))}
    arrays = {
        name: np.memmap(
            folder / f"{name}.u8",
            np.uint8,
            "r+" if (folder / f"{name}.u8").exists() else "w+",
            shape=(spec.num_scenes, *shape),
        )
        for name, shape in shapes.items()
    }
    done = folder / "drawn"
    start = int(done.read_text()) if done.exists() else 0
    for first, tiles, labels in _draw_chunks(spec, start):
        arrays["tiles"][first : first + len(tiles)] = tiles
        arrays["labels"][first : first + len(labels)] = labels
        write_whole(done, str(first + len(tiles)))
    return SceneCache(spec, arrays["tiles"], arrays["labels"])


def _draw_chunks(spec: CacheSpec, start: int) -> Iterator[tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    firsts = range(start, spec.num_scenes, _CHUNK)
    if not firsts:
        return
    with ProcessPoolExecutor(os.cpu_count()) as pool, tqdm(total=spec.num_scenes, initial=start, unit="scene") as bar:
        draw = functools.partial(_draw_chunk, spec)
        for batch in _batched(firsts, 64):
            for first, (tiles, labels) in zip(batch, pool.map(draw, batch), strict=True):
                yield first, tiles, labels
                bar.update(len(tiles))


def _batched(values: range, size: int) -> Iterator[range]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _draw_chunk(spec: CacheSpec, first: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    config = PreprocessConfig(size=spec.size)
    scenes = [training_scene(spec, i) for i in range(first, min(first + _CHUNK, spec.num_scenes))]
    tiles = np.concatenate([preprocess(render_training_picture(scene), config) for scene in scenes])
    return tiles, np.stack([patch_labels(scene, spec) for scene in scenes])


def patch_labels(scene: Scene, spec: CacheSpec) -> npt.NDArray[np.uint8]:
    """What each patch shows: uint8 (grid * grid, len(LABELS)), row-major, columns in the order of LABELS."""
    longest = max(scene.width, scene.height)
    scale = spec.size / longest
    shift = ((longest - scene.width) // 2, (longest - scene.height) // 2)
    labels = np.zeros((spec.grid, spec.grid, len(LABELS)), np.uint8)
    middle = (np.arange(spec.grid) + 0.5) * spec.patch
    for thing in scene.objects:
        x, y = (thing.x + shift[0]) * scale, (thing.y + shift[1]) * scale
        inside = (middle[None, :] - x) ** 2 + (middle[:, None] - y) ** 2 < (thing.diameter * scale / 2) ** 2
        row, column = int(y / spec.patch), int(x / spec.patch)
        inside[row, column] = True
        labels[inside, 1:5] = _facts(thing)
        labels[row, column, 0] = 1
    if scene.text is not None:
        alphabet = LETTERS + DIGITS
        for character, (left, top) in zip(scene.text.text, character_centres(scene.text), strict=True):
            across = min(max((left + shift[0]) * scale / spec.patch, 0.0), spec.grid - 0.01)
            down = int((top + shift[1]) * scale / spec.patch)
            labels[down, int(across), 5 if across % 1 < 0.5 else 6] = 1 + alphabet.index(character)
    return labels.reshape(-1, len(LABELS))


def _facts(thing: SceneObject) -> tuple[int, int, int, int]:
    places = [name for row in PLACES for name in row]
    return (
        1 + SHAPES.index(thing.shape),
        1 + list(COLOURS).index(thing.colour),
        1 + list(SIZES).index(thing.size),
        1 + places.index(thing.place),
    )
