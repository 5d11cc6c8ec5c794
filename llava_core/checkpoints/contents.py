"""A checkpoint's table of contents: which file holds which of our tensors, and how it is stored there.

Reads headers, no weights. Does not check whether anything is missing; accounting.py does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_core.checkpoints.headers import TensorInfo, read_header
from llava_core.checkpoints.keymaps import Key
from llava_core.checkpoints.weights import Weights
from llava_core.errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, under its name there. With `is_rounded` it is to be rounded to float16."""

    file: Path
    name: str
    info: TensorInfo
    is_rounded: bool = False


def stored_tensors(weights: Iterable[Weights]) -> dict[Key, Stored]:
    """Every tensor by our key, file by file; where two `weights` hold the same tensor, the later one wins.

    Raises CheckpointError for a damaged file, and for an index that names tensors which its file does not hold.
    """
    found: dict[Key, Stored] = {}
    for each in weights:
        headers = {file: read_header(file) for file in sorted(set(each.files.values()))}
        keys, _ = each.sorted_keys()
        for name, file in sorted(each.files.items(), key=lambda item: item[1]):
            if name not in headers[file]:
                raise CheckpointError(f"{file} does not hold {name}, which the index says it does; download it again")
            if name in keys and keys[name].part in each.parts:
                found[keys[name]] = Stored(file, name, headers[file][name], each.is_rounded)
    return found
