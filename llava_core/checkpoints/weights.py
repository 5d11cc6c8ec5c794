"""The weights in a folder or file under our names, and which of a model's parts are taken from them. Reads names only.

Knows nothing about layouts: layout.py decides which weights override which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llava_core.checkpoints.files import find_tensors, read_json, tensor_names
from llava_core.checkpoints.keymaps import Key, KeyMap, Part, from_llava_hf, from_original
from llava_core.errors import CheckpointError

ALL_PARTS: frozenset[Part] = frozenset({"tower", "projector", "decoder", "newline"})


@dataclass(frozen=True)
class Weights:
    """The model in a folder, or one `file` of it: how its names are mapped, and which parts are taken from it.

    With `is_rounded` its numbers are rounded to float16, whatever the compute dtype.
    """

    folder: Path
    key_map: KeyMap
    parts: frozenset[Part] = ALL_PARTS
    file: Path | None = None
    is_rounded: bool = False

    @cached_property
    def files(self) -> dict[str, Path]:
        """Which file holds each foreign name; looked up on first use, since preparing requests does not need it."""
        if self.file is not None:
            return dict.fromkeys(tensor_names(self.file), self.file)
        return find_tensors(self.folder)

    def keys(self) -> dict[str, Key]:
        """Our key of every tensor that is not dropped on purpose. Raises CheckpointError naming unknown ones."""
        keys, unknown = self.sorted_keys()
        if unknown:
            raise CheckpointError(f"{self.folder} holds {len(unknown)} tensors of unknown purpose: {first(unknown)}")
        return keys

    def sorted_keys(self) -> tuple[dict[str, Key], list[str]]:
        """The same, along with the names that no row of the key table covers."""
        keys: dict[str, Key] = {}
        unknown = []
        for name in self.files:
            try:
                key = self.key_map(name)
            except KeyError:
                unknown.append(name)
                continue
            if key is not None:
                keys[name] = key
        return keys, unknown


def find_weights(folder: Path, parts: frozenset[Part] = ALL_PARTS) -> Weights:
    """A folder's own weights, whether or not it is a whole LLaVA: a text-only decoder uses the originals' names."""
    is_llava_hf = isinstance(read_json(folder, "config.json").get("vision_config"), dict)
    return Weights(folder, from_llava_hf if is_llava_hf else from_original, parts)


def holds(weights: Iterable[Weights], part: Part) -> bool:
    """Whether tensors of this part are taken from any of the `weights`. Unknown names are ignored."""
    return any(
        part in each.parts and any(key.part == part for key in each.sorted_keys()[0].values()) for each in weights
    )


def without(weights: Iterable[Weights], part: Part) -> tuple[Weights, ...]:
    """The same `weights`, but with this part taken from none of them."""
    return tuple(replace(each, parts=each.parts - {part}) for each in weights)


def first(names: list[str], count: int = 10) -> str:
    """The first few of a list of names, for a message."""
    shown = ", ".join(names[:count])
    return shown + (", ..." if len(names) > count else "") if names else "none"
