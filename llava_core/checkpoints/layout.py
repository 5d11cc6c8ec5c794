"""What a checkpoint's folder is, judged by its files and fields and never by its name: layout, base, tower, weights.

    llava-hf      config.json with vision_config and text_config, all weights
    original      config.json with mm_vision_tower, all weights; the tower inside or elsewhere
    projector     the same config.json with only mm_projector, over a base
    LoRA          the same config.json with adapter_model and non_lora_trainables, over a base; RaDialog's tower in it
    PEFT adapter  only adapter_model, over a base that is a complete LLaVA
    delta         delta_base in config.json: differences to a base, which must be applied before anything else
    text-only     a vocabulary and no tower: not a LLaVA, but the base of one

Reads configurations and headers, no weights, and imports no torch for safetensors. Knows nothing about modules.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llava_core.checkpoints.bases import base_name, check_base, check_trained_alone, find_base
from llava_core.checkpoints.files import find_file, find_non_lora, has_model, naming, read_json
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.keymaps import from_biovil, from_llava_hf, from_original, from_tower, from_wrapped
from llava_core.checkpoints.original_config import (
    check_image_pooling,
    is_original_config,
    read_original_config,
    tower_name,
)
from llava_core.checkpoints.towers import BIOVIL, BIOVIL_CONFIG, check_biovil, find_biovil_file, find_tower
from llava_core.checkpoints.weights import Weights, holds, without
from llava_core.config import JsonObject, ModelConfig, read_llava_hf_config
from llava_core.errors import CheckpointError
from llava_core.fields import Fields

logger = logging.getLogger(__name__)
Layout = Literal[
    "llava-hf", "original", "original projector", "original LoRA", "PEFT adapter", "delta", "text-only", "unknown"
]
# Marks the deltas that this project makes. The original code's deltas have no such mark.
DELTA_FIELD = "delta_base"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to be loaded. Where two `weights` hold the same tensor, the later one wins.

    `settings` is the config.json with the model's fields, `text_folder` holds the tokenizer, `image_folder` the image
    settings of the tower (None: those of the known tower), `adapter` LoRA matrices. `revisions` has the revisions at
    which hub ids were found: of the checkpoint, its base and its tower, as far as they are on the hub.
    """

    folder: Path
    settings: JsonObject
    config: ModelConfig
    weights: tuple[Weights, ...]
    text_folder: Path
    image_folder: Path | None
    adapter: Path | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether the whole decoder is the checkpoint's own."""
        return self.text_folder == self.folder


def open_checkpoint(
    path_or_id: str | Path,
    base: str | Path | None = None,
    *,
    offline: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Find everything a checkpoint needs. With `offline` nothing is downloaded; with the `revisions` of a checkpoint
    opened before, the very same one is opened again, on any machine.

    Raises CheckpointError naming file, field and fix; missing parts are all reported at once.
    """
    hub = Hub(offline=offline, revisions=revisions)
    try:
        folder = hub.find(str(path_or_id), "the model")
    except CheckpointError as error:
        if base is None or not offline:
            raise
        raise CheckpointError("; ".join([str(error), *_missing_base(base, hub)])) from error
    return replace(_open(folder, base, hub), revisions=hub.found)


def _missing_base(base: str | Path, hub: Hub) -> list[str]:
    try:
        hub.find(str(base), "the base")
    except CheckpointError as error:
        return [str(error)]
    return []


def _open(folder: Path, base: str | Path | None, hub: Hub) -> Checkpoint:
    layout = find_layout(folder)
    if layout == "PEFT adapter":
        return _open_adapter(folder, base, hub)
    settings = read_json(folder, "config.json")
    if layout == "delta":
        raise CheckpointError(
            f"{folder / 'config.json'}: {DELTA_FIELD} says that these are the differences to {settings[DELTA_FIELD]}, "
            f"not a model; apply them to it: llava delta apply {settings[DELTA_FIELD]} {folder} OUT"
        )
    _refuse_quantised(folder, settings)
    if layout in ("llava-hf", "text-only", "unknown"):
        # The reader reports what the other two layouts lack.
        return _open_llava_hf(folder, settings, base)
    with naming(folder / "config.json"):
        check_image_pooling(settings)
    if layout == "original":
        return _open_original(folder, settings, base, hub)
    return _open_over_base(folder, settings, _find_overlay(folder), base, hub)


def find_layout(folder: Path) -> Layout:
    """Which of the layouts a folder has. Raises CheckpointError when config.json is missing or damaged."""
    overlay = _find_overlay(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter and overlay is None:
        return "PEFT adapter"
    settings = read_json(folder, "config.json")
    if DELTA_FIELD in settings:
        return "delta"
    if all(isinstance(settings.get(field), dict) for field in ("vision_config", "text_config")):
        return "llava-hf"
    if not is_original_config(settings):
        # A tower on its own has no vocabulary.
        return "text-only" if "vocab_size" in settings else "unknown"
    # Next to a whole model, mm_projector.bin is a copy of the model's own projector.
    if overlay is None or (has_model(folder) and not is_adapter):
        return "original"
    return "original LoRA" if is_adapter else "original projector"


def _find_overlay(folder: Path) -> Path | None:
    is_adapter = (folder / "adapter_config.json").exists()
    return find_non_lora(folder) if is_adapter else find_file(folder, "mm_projector")


def _refuse_quantised(folder: Path, settings: JsonObject) -> None:
    text = settings.get("text_config")
    kind = settings.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if kind:
        method = kind.get("quant_method", "unnamed") if isinstance(kind, dict) else kind
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config says that the weights are stored quantised ({method}); "
            "load the model that they were made from, with --quantization"
        )


def _open_llava_hf(folder: Path, settings: JsonObject, base: str | Path | None) -> Checkpoint:
    with naming(folder / "config.json"):
        config = read_llava_hf_config(settings)
    _refuse_base(folder, base)
    weights = Weights(folder, from_llava_hf)
    return Checkpoint(folder, settings, with_generation_config(config, folder), (weights,), folder, folder)


def _refuse_base(folder: Path, base: str | Path | None) -> None:
    if base is not None:
        raise CheckpointError(f"{folder} is a complete model and takes no base; leave --base out")


def _open_original(folder: Path, settings: JsonObject, base: str | Path | None, hub: Hub) -> Checkpoint:
    _refuse_base(folder, base)
    weights: tuple[Weights, ...] = (Weights(folder, from_original),)
    with naming(folder / "config.json"):
        is_biovil = tower_name(settings) == BIOVIL
    # A merged RaDialog is saved without its tower, which stays in the file it came in.
    if is_biovil and (rest := find_non_lora(folder)):
        weights += (Weights(folder, from_wrapped, file=rest),)
    config, image_folder, weights = _with_tower(folder, settings, weights, hub)
    config, weights = with_generation_config(config, folder), _without_spare_newline(folder, config, weights)
    return Checkpoint(folder, settings, config, weights, folder, image_folder)


def _open_over_base(
    folder: Path, settings: JsonObject, overlay: Path | None, base: str | Path | None, hub: Hub
) -> Checkpoint:
    """An original LoRA or projector: configuration and `overlay` from the folder, the decoder from the base."""
    assert overlay is not None, folder
    is_lora = (folder / "adapter_config.json").exists()
    # The original code rounds a separate projector, and nothing else, to float16.
    own = Weights(folder, from_wrapped, file=overlay, is_rounded=not is_lora)
    problems: list[CheckpointError] = []
    below: tuple[Path, Weights] | None = None
    try:
        below = find_base(folder, base, hub, takes_tower=_has_trained_tower(folder, settings))
    except CheckpointError as error:
        problems.append(error)
    try:
        config, image_folder, weights = _with_tower(folder, settings, _laid_over(below, own), hub)
    except CheckpointError as error:
        problems.append(error)
    if problems or below is None:
        raise CheckpointError("; ".join(map(str, problems))) from problems[0]
    check_base(config, folder, below[0])
    config, weights = with_generation_config(config, below[0]), _without_spare_newline(folder, config, weights)
    return Checkpoint(folder, settings, config, weights, below[0], image_folder, folder if is_lora else None)


def _laid_over(below: tuple[Path, Weights] | None, own: Weights) -> tuple[Weights, ...]:
    """The base's weights and a checkpoint's. Two projectors are never mixed, since their shapes may differ."""
    if below is None:
        return (own,)
    has_projector = any(key.part == "projector" for key in own.keys().values())
    return *(without([below[1]], "projector") if has_projector else [below[1]]), own


def _open_adapter(folder: Path, base: str | Path | None, hub: Hub) -> Checkpoint:
    """Open a PEFT adapter: everything but its matrices comes from the base."""
    name = base_name(folder, base)
    below_folder = hub.find(str(name), f"the base of {folder}")
    check_trained_alone(folder, below_folder, find_layout(below_folder))
    below = _open(below_folder, None, hub)
    if below.adapter is not None:
        raise CheckpointError(f"{below.folder}, the base of {folder}, is an adapter itself; merge it first")
    return replace(below, adapter=folder)


def _with_tower(
    folder: Path, settings: JsonObject, weights: tuple[Weights, ...], hub: Hub
) -> tuple[ModelConfig, Path | None, tuple[Weights, ...]]:
    """The configuration including the tower's, the folder of image settings, and the weights including the tower's.

    As in the original code, a tower inside the checkpoint or its base is used if it was trained
    (`unfreeze_mm_vision_tower`), otherwise the named one; if that is not available here, the copy inside replaces it.
    """
    with naming(folder / "config.json"):
        name = tower_name(settings)
    if name == BIOVIL:
        return _with_biovil(folder, settings, weights)
    has_own = holds(weights, "tower")
    is_inside = has_own and _has_trained_tower(folder, settings)
    try:
        source = find_tower(name, folder, is_inside=is_inside, hub=hub)
    except CheckpointError:
        # Where a revision is pinned, other replicas have that one, so no copy may replace it.
        if not has_own or is_inside or hub.is_pinned(name):
            raise
        source, is_inside = find_tower(name, folder, is_inside=True, hub=hub), True
        logger.info("%s: the tower %s is not here; the copy inside the checkpoint is used", folder, name)
    with naming(folder / "config.json"):
        config = read_original_config(settings, source.config)
    if is_inside or source.folder is None:
        return config, source.folder, weights
    tower = Weights(source.folder, from_tower)
    return config, source.folder, (tower, *without(weights, "tower"))


def _without_spare_newline(folder: Path, config: ModelConfig, weights: tuple[Weights, ...]) -> tuple[Weights, ...]:
    """Drop an `image_newline` that nothing reads: a LLaVA-1.6 trained further as `flat` is still saved with it."""
    if config.has_newline or not holds(weights, "newline"):
        return weights
    logger.info("%s: image_newline is not used with mm_patch_merge_type %s", folder, config.merge_type)
    return without(weights, "newline")


def _has_trained_tower(folder: Path, settings: JsonObject) -> bool:
    """Whether the model's own weights include the tower to use. RaDialog's is where its code puts it."""
    with naming(folder / "config.json"):
        return Fields(settings).flag("unfreeze_mm_vision_tower", False) and tower_name(settings) != BIOVIL


def _with_biovil(
    folder: Path, settings: JsonObject, weights: tuple[Weights, ...]
) -> tuple[ModelConfig, Path | None, tuple[Weights, ...]]:
    """RaDialog: the checkpoint includes its tower; the released file supplies tensors that were not trained."""
    with naming(folder / "config.json"):
        config = read_original_config(settings, BIOVIL_CONFIG)
    if released := find_biovil_file(folder):
        weights = (Weights(folder, from_biovil, frozenset({"tower"}), released), *weights)
    of_tower = [each for each in weights if "tower" in each.parts]
    check_biovil(folder, {key.name for each in of_tower for key in each.keys().values() if key.part == "tower"})
    return config, None, weights


def with_generation_config(config: ModelConfig, folder: Path) -> ModelConfig:
    """Use the end tokens in generation_config.json where there is one."""
    if not (folder / "generation_config.json").exists():
        return config
    fields = Fields(read_json(folder, "generation_config.json"))
    with naming(folder / "generation_config.json"):
        eos = fields.optional("eos_token_id", Fields.tokens)
        return config if eos is None else replace(config, eos_token_ids=eos)
