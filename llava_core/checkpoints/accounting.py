"""Does a checkpoint hold every tensor its config.json calls for? Judged by names alone, in a moment, without torch.

For whoever must know before slow work begins, such as starting a service. Loading (load.py) judges again, shapes too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from llava_core.checkpoints.describe import load_config
from llava_core.checkpoints.files import find_tensors
from llava_core.checkpoints.keymaps import Key, Part, from_llava_hf
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError

_LAYER = re.compile(r"layers\.(\d+)\.")
# transformers' own defaults, which its configuration files leave out.
_DEFAULT_LAYERS: dict[Part, int] = {"tower": 12, "decoder": 32}

_TOWER = {
    "model.embeddings.class_embedding",
    "model.embeddings.patch_embedding.weight",
    "model.embeddings.position_embedding.weight",
    "model.pre_layrnorm.weight",
    "model.pre_layrnorm.bias",
    "model.post_layernorm.weight",
    "model.post_layernorm.bias",
}


def check_tensors(folder: Path) -> None:
    """Raise CheckpointError for damaged files, for unknown tensors, and for parts or layers that are not complete."""
    config = load_config(folder)
    names = _names_by_part(folder)
    _check_layers(folder, "tower", names["tower"], config.vision.architecture.get("num_hidden_layers"))
    _check_layers(folder, "decoder", names["decoder"], config.text.get("num_hidden_layers"))
    missing = sorted(
        f"{part} {name}" for part, expected in _outside_layers(config).items() for name in expected - names[part]
    )
    if missing:
        raise CheckpointError(f"{folder}: config.json calls for {_first(missing)}, which no file of it holds")


def _names_by_part(folder: Path) -> dict[Part, set[str]]:
    names: dict[Part, set[str]] = {"tower": set(), "projector": set(), "decoder": set()}
    unknown = []
    for name in find_tensors(folder):
        try:
            key: Key | None = from_llava_hf(name)
        except KeyError:
            unknown.append(name)
            continue
        if key is not None:
            names[key.part].add(key.name)
    if unknown:
        raise CheckpointError(f"{folder} holds {len(unknown)} tensors of unknown purpose: {_first(unknown)}")
    return names


def _check_layers(folder: Path, part: Part, names: Iterable[str], num_layers: int | None) -> None:
    """Every layer must be there and hold what the fullest one holds: a hole shows without knowing the architecture."""
    layers: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _LAYER.search(name):
            layers[int(match.group(1))].add(name[match.end() :])
    full = set().union(*layers.values())
    count = _DEFAULT_LAYERS[part] if num_layers is None else num_layers
    missing = [f"layer {i}: {name}" for i in range(count) for name in sorted(full - layers[i])]
    if not full or missing or len(layers) > count:
        raise CheckpointError(
            f"{folder}: config.json calls for {count} {part} layers, the files hold {sum(map(bool, layers.values()))}; "
            f"missing are: {_first(missing)}"
        )


def _outside_layers(config: ModelConfig) -> dict[Part, set[str]]:
    projector = {"0.weight", "2.weight"} | ({"0.bias", "2.bias"} if config.projector_bias else set())
    head = set() if config.tie_word_embeddings else {"lm_head.weight"}
    return {
        "tower": _TOWER,
        "projector": projector if config.projector_type == "mlp2x_gelu" else set(),
        "decoder": {"model.embed_tokens.weight", "model.norm.weight"} | head,
    }


def _first(names: list[str], count: int = 5) -> str:
    shown = ", ".join(names[:count])
    return shown + (", ..." if len(names) > count else "") if names else "none"
