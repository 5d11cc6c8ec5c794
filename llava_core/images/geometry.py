"""How a picture is cut into tiles, how many tokens it becomes, and in which order. The one place that decides this.

Prompts, scheduling and merging all use it. Integers only; imports neither torch nor Pillow. The floating-point steps
are the originals' own, term by term: another order of multiplication would move some sizes by a pixel.
"""

from __future__ import annotations

import math

from llava_core.config import Dialect, ModelConfig, VisionConfig
from llava_core.types import Size

# In a merge order: the learned end-of-line vector instead of a row of the tower.
NEWLINE = -1


def best_resolution(size: Size, candidates: tuple[Size, ...]) -> Size:
    """The candidate that keeps the most of the picture's pixels, then wastes the fewest, then comes first."""

    def fit(candidate: Size) -> tuple[int, int]:
        scale = min(candidate.width / size.width, candidate.height / size.height)
        kept = min(int(size.width * scale) * int(size.height * scale), size.width * size.height)
        return kept, kept - candidate.width * candidate.height

    return max(candidates, key=fit)


def scaled_size(size: Size, target: Size) -> Size:
    """The largest size with the picture's aspect ratio that fits into `target`, rounded up."""
    across, down = target.width / size.width, target.height / size.height
    if across < down:
        return Size(target.width, min(math.ceil(size.height * across), target.height))
    return Size(min(math.ceil(size.width * down), target.width), target.height)


def tile_grid(config: ModelConfig, size: Size | None) -> Size | None:
    """Columns and rows of tiles besides the overview; None where pictures, or this one (`size` None), have one tile."""
    if not config.pinpoints or size is None:
        return None
    best = best_resolution(size, config.pinpoints)
    side = config.vision.image_size
    return Size(best.width // side, best.height // side)


def unpadded(grid: Size, size: Size, dialect: Dialect) -> tuple[int, int, int, int]:
    """The part (left, top, right, bottom) of a feature grid that the picture fills, padding cut off on both sides.

    The original code truncates the kept length directly; transformers first rounds it to seven digits.
    """

    def kept(length: int, scale: float) -> int:
        exact = length * scale
        return int(round(exact, 7) if dialect == "llava_hf" else exact)

    if size.width / size.height > grid.width / grid.height:
        cut = (grid.height - kept(size.height, grid.width / size.width)) // 2
        return 0, cut, grid.width, grid.height - cut
    cut = (grid.width - kept(size.width, grid.height / size.height)) // 2
    return cut, 0, grid.width - cut, grid.height


def num_image_tokens(config: ModelConfig, size: Size | None) -> int:
    """Number of placeholders for one picture of `size` pixels; None: a picture with only an overview."""
    per_tile = config.vision.tokens_per_tile
    tiles = tile_grid(config, size)
    if tiles is None or size is None:
        return per_tile + _ends_overview(config)
    if config.merge_type != "spatial_unpad":
        return per_tile * (1 + tiles.width * tiles.height)
    left, top, right, bottom = unpadded(_feature_grid(config.vision, tiles), size, config.dialect)
    return per_tile + (bottom - top) * (right - left + 1)


def merge_order(config: ModelConfig, size: Size | None) -> tuple[int, ...] | None:
    """For each token of a picture, the row of its tiles, or NEWLINE; None where the rows are used in their own order.

    Rows are numbered through all tiles, the overview first, each row by row. `spatial` reads the other tiles as one
    large grid, line by line; `spatial_unpad` also leaves out the padding and ends every line with the newline, and an
    overview without other tiles likewise.
    """
    tiles = tile_grid(config, size)
    if tiles is None or size is None:
        return (*range(config.vision.tokens_per_tile), NEWLINE) if _ends_overview(config) else None
    if config.merge_type == "flat":
        return None
    grid = _feature_grid(config.vision, tiles)
    box = (0, 0, grid.width, grid.height)
    if config.merge_type == "spatial_unpad":
        box = unpadded(grid, size, config.dialect)
    side, per_tile = config.vision.patches_per_side, config.vision.tokens_per_tile
    order = list(range(per_tile))
    for y in range(box[1], box[3]):
        for x in range(box[0], box[2]):
            tile = 1 + (y // side) * tiles.width + x // side
            order.append(tile * per_tile + (y % side) * side + x % side)
        if config.merge_type == "spatial_unpad":
            order.append(NEWLINE)
    return tuple(order)


def _ends_overview(config: ModelConfig) -> bool:
    """Whether a newline follows an overview without other tiles."""
    return bool(config.pinpoints) and config.merge_type == "spatial_unpad"


def _feature_grid(vision: VisionConfig, tiles: Size) -> Size:
    return Size(tiles.width * vision.patches_per_side, tiles.height * vision.patches_per_side)
