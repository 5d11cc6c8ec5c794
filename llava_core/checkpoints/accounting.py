"""Does a checkpoint hold every tensor its config.json calls for? Judged by names alone, in a moment, without torch.

For whoever must know before slow work begins, such as starting a service. Loading (load.py) judges again, shapes too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from llava_core.checkpoints.keymaps import Part
from llava_core.checkpoints.layout import Checkpoint, first, open_checkpoint
from llava_core.config import BIOVIL_T, ModelConfig
from llava_core.errors import CheckpointError
from llava_core.vision.biovil_keys import tensor_names

_LAYER = re.compile(r"layers\.(\d+)\.")

_SIGLIP = {
    "model.embeddings.patch_embedding.weight",
    "model.embeddings.position_embedding.weight",
    "model.post_layernorm.weight",
    "model.post_layernorm.bias",
}
_CLIP = _SIGLIP | {"model.embeddings.class_embedding", "model.pre_layrnorm.weight", "model.pre_layrnorm.bias"}
# By kind of tower, what belongs to no layer.
_TOWERS = {"clip_vision_model": _CLIP, "siglip_vision_model": _SIGLIP, BIOVIL_T: tensor_names()}


def check_tensors(checkpoint: Path | Checkpoint) -> None:
    """Raise CheckpointError for damaged files, for unknown tensors, and for parts or layers that are not complete."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    config, folder = opened.config, opened.folder
    names = _names_by_part(opened)
    if config.vision.architecture["model_type"] != BIOVIL_T:
        _check_layers(folder, "tower", names["tower"], config.vision.architecture["num_hidden_layers"])
    _check_layers(folder, "decoder", names["decoder"], config.text["num_hidden_layers"])
    missing = sorted(
        f"{part} {name}" for part, expected in _outside_layers(config).items() for name in expected - names[part]
    )
    if names["newline"] and not config.has_newline:
        raise CheckpointError(
            f"{folder} holds image_newline, which mm_patch_merge_type {config.merge_type} does not have"
        )
    if missing:
        raise CheckpointError(f"{folder}: config.json calls for {first(missing, 5)}, which no file of it holds")


def _names_by_part(checkpoint: Checkpoint) -> dict[Part, set[str]]:
    names: dict[Part, set[str]] = {"tower": set(), "projector": set(), "decoder": set(), "newline": set()}
    for weights in checkpoint.weights:
        for key in weights.keys().values():
            if key.part in weights.parts:
                names[key.part].add(key.name)
    return names


def _check_layers(folder: Path, part: Part, names: Iterable[str], count: int) -> None:
    """Every layer must be there and hold what the fullest one holds: a hole shows without knowing the architecture."""
    layers: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _LAYER.search(name):
            layers[int(match.group(1))].add(name[match.end() :])
    full = set().union(*layers.values())
    missing = [f"layer {i}: {name}" for i in range(count) for name in sorted(full - layers[i])]
    if not full or missing or len(layers) > count:
        raise CheckpointError(
            f"{folder}: config.json calls for {count} {part} layers, the files hold {sum(map(bool, layers.values()))}; "
            f"missing are: {first(missing, 5)}"
        )


def _outside_layers(config: ModelConfig) -> dict[Part, set[str]]:
    depth = {"linear": 1, "identity": 0}.get(config.projector_type)
    if depth is None:
        depth = int(config.projector_type.removeprefix("mlp").removesuffix("x_gelu"))
    kinds = ("weight", "bias") if config.projector_bias else ("weight",)
    head = set() if config.tie_word_embeddings else {"lm_head.weight"}
    return {
        "tower": set(_TOWERS[config.vision.architecture["model_type"]]),
        "projector": {f"{2 * index}.{kind}" for index in range(depth) for kind in kinds},
        "decoder": {"model.embed_tokens.weight", "model.norm.weight"} | head,
        "newline": {"image_newline"} if config.has_newline else set(),
    }
