"""Does a checkpoint hold every tensor its config.json calls for, and no other? Judged by headers, without torch.

For whoever must know before slow work begins, such as starting a service. Loading (load.py) judges again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_core.checkpoints.contents import Stored
from llava_core.checkpoints.keymaps import HEAD_KEY, NEWLINE_KEY, Key, Part
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.shapes import expected_shapes
from llava_core.checkpoints.weights import first
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError

_LAYER = re.compile(r"layers\.(\d+)\.")


def check_tensors(checkpoint: Path | Checkpoint) -> None:
    """Raise CheckpointError for damaged files, for unknown tensors, and for missing or left-over ones; names alone."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    problems = name_problems(opened)
    if problems:
        raise CheckpointError(f"{opened.folder}: {first(problems, 5)}")


def check_shapes(config: ModelConfig, stored: Mapping[Key, Stored]) -> None:
    """Raise CheckpointError for tensors of another shape than config.json says; reads headers alone."""
    problems = shape_problems(config, stored)
    if problems:
        raise CheckpointError(first(problems, 5))


def name_problems(checkpoint: Checkpoint) -> list[str]:
    """Everything that is missing, left over, or of unknown purpose. Raises CheckpointError for damaged files."""
    names: set[Key] = set()
    problems = []
    for weights in checkpoint.weights:
        keys, unknown = weights.sorted_keys()
        names |= {key for key in keys.values() if key.part in weights.parts}
        if unknown:
            problems.append(f"{weights.folder} holds {len(unknown)} tensors of unknown purpose: {', '.join(unknown)}")
    expected = expected_shapes(checkpoint.config)
    for part in ("tower", "decoder"):
        problems += _layer_problems(part, names, expected)
    problems += [f"{key.part} {key.name} is missing" for key in sorted(set(expected) - names)]
    return problems + [_left_over(key, checkpoint.config) for key in sorted(names - set(expected) - {HEAD_KEY})]


def shape_problems(config: ModelConfig, stored: Mapping[Key, Stored]) -> list[str]:
    """Every tensor of another shape than config.json says."""
    expected = {HEAD_KEY: (config.vocab_size, config.hidden_size), **expected_shapes(config)}
    return [
        f"{key.part} {key.name} has shape {found.info.shape} in {found.file}, config.json says {expected[key]}"
        for key, found in stored.items()
        if expected.get(key) not in (None, found.info.shape)
    ]


def _layer_problems(part: Part, names: Iterable[Key], expected: Iterable[Key]) -> list[str]:
    """One line for layers that are missing or too many, which says more than the names of all their tensors."""
    found, wanted = _layers(part, names), _layers(part, expected)
    if found == wanted:
        return []
    differing = ", ".join(f"layer {layer}" for layer in sorted(found ^ wanted))
    kind = "missing are" if wanted - found else "too many are"
    return [f"config.json calls for {len(wanted)} {part} layers, the files hold {len(found)}; {kind}: {differing}"]


def _layers(part: Part, keys: Iterable[Key]) -> set[int]:
    matches = (_LAYER.search(key.name) for key in keys if key.part == part)
    return {int(match.group(1)) for match in matches if match}


def _left_over(key: Key, config: ModelConfig) -> str:
    if key == NEWLINE_KEY:
        return f"image_newline is there, which mm_patch_merge_type {config.merge_type} does not have"
    return f"{key.part} {key.name} is there, and config.json does not call for it"
