"""What a checkpoint's folder is, judged by its files and fields and never by its name: layout, base, tower, weights.

    llava-hf      config.json with vision_config and text_config, all weights
    original      config.json with mm_vision_tower, all weights; the tower inside or elsewhere
    projector     the same config.json with mm_projector alone, over a base
    LoRA          the same config.json with adapter_model and non_lora_trainables, over a base; RaDialog's tower in it
    PEFT adapter  adapter_model alone, over a base that is a complete LLaVA
    delta         delta_base in config.json: differences to a base, which must be applied before anything else

Reads configurations and headers, no weights, and imports no torch for safetensors. Knows nothing about modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llava_core.checkpoints.files import find_file, find_non_lora, has_model, read_json, resolve_checkpoint
from llava_core.checkpoints.keymaps import Part, from_biovil, from_llava_hf, from_original, from_tower, from_wrapped
from llava_core.checkpoints.original_config import (
    check_image_pooling,
    is_original_config,
    read_original_config,
    tower_name,
)
from llava_core.checkpoints.towers import BIOVIL, BIOVIL_CONFIG, check_biovil, find_biovil_file, find_tower
from llava_core.checkpoints.weights import ALL_PARTS, holds, without
from llava_core.checkpoints.weights import Weights as Weights
from llava_core.checkpoints.weights import first as first
from llava_core.config import JsonObject, ModelConfig, eos_token_ids, read_llava_hf_config
from llava_core.errors import CheckpointError

logger = logging.getLogger(__name__)
Layout = Literal["llava-hf", "original", "original projector", "original LoRA", "PEFT adapter", "delta"]
# Of the deltas that this project makes. Those that the original code made have nothing to be told by.
DELTA_FIELD = "delta_base"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint ready to be loaded. Of two `weights` that hold the same tensor the later one counts.

    `settings` is the config.json with the model's fields, `text_folder` holds the tokenizer, `image_folder` says how
    the tower wants its pictures (None: as the known tower does), `adapter` holds LoRA matrices.
    """

    folder: Path
    settings: JsonObject
    config: ModelConfig
    weights: tuple[Weights, ...]
    text_folder: Path
    image_folder: Path | None
    adapter: Path | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all of the decoder is the checkpoint's own."""
        return self.text_folder == self.folder


def open_checkpoint(path_or_id: str | Path, base: str | Path | None = None, *, offline: bool = False) -> Checkpoint:
    """Find everything a checkpoint needs. With `offline` nothing is fetched.

    Raises CheckpointError naming file, field and fix, and every part that is missing at once.
    """
    folder = resolve_checkpoint(str(path_or_id), offline=offline)
    layout = find_layout(folder)
    if layout == "PEFT adapter":
        return _open_adapter(folder, base, offline=offline)
    settings = read_json(folder, "config.json")
    if layout == "delta":
        raise CheckpointError(
            f"{folder} holds the differences to {settings[DELTA_FIELD]}, not a model; apply them to it: "
            f"llava delta apply {settings[DELTA_FIELD]} {folder} OUT"
        )
    _refuse_quantised(folder, settings)
    if layout == "llava-hf":
        return _open_llava_hf(folder, settings, base)
    with _naming(folder):
        check_image_pooling(settings)
    if layout == "original":
        return _open_original(folder, settings, base, offline=offline)
    return _open_over_base(folder, settings, _find_overlay(folder), base, offline=offline)


def find_layout(folder: Path) -> Layout:
    """Which of the layouts a folder has. Raises CheckpointError when config.json is missing or damaged."""
    overlay = _find_overlay(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter and overlay is None:
        return "PEFT adapter"
    settings = read_json(folder, "config.json")
    if DELTA_FIELD in settings:
        return "delta"
    if not is_original_config(settings):
        return "llava-hf"
    # Beside a whole model mm_projector.bin is a copy of what the model holds.
    if overlay is None or (has_model(folder) and not is_adapter):
        return "original"
    return "original LoRA" if is_adapter else "original projector"


def _find_overlay(folder: Path) -> Path | None:
    is_adapter = (folder / "adapter_config.json").exists()
    return find_non_lora(folder) if is_adapter else find_file(folder, "mm_projector")


def _refuse_quantised(folder: Path, settings: JsonObject) -> None:
    kind = settings.get("quantization_config") or (settings.get("text_config") or {}).get("quantization_config")
    if kind:
        method = kind.get("quant_method", "unnamed") if isinstance(kind, dict) else kind
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config says that the weights are stored quantised ({method}); "
            "load the model that they were made from, with --quantization"
        )


def _open_llava_hf(folder: Path, settings: JsonObject, base: str | Path | None) -> Checkpoint:
    with _naming(folder):
        config = with_generation_config(read_llava_hf_config(settings), folder)
    _refuse_base(folder, base)
    weights = Weights(folder, from_llava_hf)
    return Checkpoint(folder, settings, config, (weights,), folder, folder)


def _refuse_base(folder: Path, base: str | Path | None) -> None:
    if base is not None:
        raise CheckpointError(f"{folder} is a complete model and takes no base; leave --base out")


def _open_original(folder: Path, settings: JsonObject, base: str | Path | None, *, offline: bool) -> Checkpoint:
    _refuse_base(folder, base)
    weights: tuple[Weights, ...] = (Weights(folder, from_original),)
    # A RaDialog that was merged is saved without its tower, which stays in the file it came in.
    if tower_name(settings) == BIOVIL and (rest := find_non_lora(folder)):
        weights += (Weights(folder, from_wrapped, file=rest),)
    config, image_folder, weights = _with_tower(folder, settings, weights, offline=offline)
    config, weights = with_generation_config(config, folder), _without_spare_newline(folder, config, weights)
    return Checkpoint(folder, settings, config, weights, folder, image_folder)


def _open_over_base(
    folder: Path, settings: JsonObject, overlay: Path | None, base: str | Path | None, *, offline: bool
) -> Checkpoint:
    """An original LoRA or projector: configuration and `overlay` from the folder, the decoder from the base."""
    assert overlay is not None, folder
    is_lora = (folder / "adapter_config.json").exists()
    # The original code rounds a projector that comes alone, and nothing else, to float16.
    own = Weights(folder, from_wrapped, file=overlay, is_rounded=not is_lora)
    problems: list[CheckpointError] = []
    below: tuple[Path, Weights] | None = None
    try:
        below = _find_base(folder, base, takes_tower=_has_trained_tower(settings), offline=offline)
    except CheckpointError as error:
        problems.append(error)
    try:
        config, image_folder, weights = _with_tower(folder, settings, _laid_over(below, own), offline=offline)
    except CheckpointError as error:
        problems.append(error)
    if problems or below is None:
        raise CheckpointError("; ".join(map(str, problems))) from problems[0]
    _check_base(config, folder, below[0])
    config, weights = with_generation_config(config, below[0]), _without_spare_newline(folder, config, weights)
    return Checkpoint(folder, settings, config, weights, below[0], image_folder, folder if is_lora else None)


def _laid_over(below: tuple[Path, Weights] | None, own: Weights) -> tuple[Weights, ...]:
    """The base's weights and a checkpoint's. A projector is never put together of two: one may be of another shape."""
    if below is None:
        return (own,)
    has_projector = any(key.part == "projector" for key in own.keys().values())
    return (*(without(below[1:], "projector") if has_projector else below[1:]), own)


def _open_adapter(folder: Path, base: str | Path | None, *, offline: bool) -> Checkpoint:
    """A PEFT adapter: everything but its matrices is the base's."""
    name = _base_name(folder, base)
    try:
        below = open_checkpoint(name, offline=offline)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} holds an adapter without non_lora_trainables.bin, so all but the adapter must come from its "
            f"base {name}: {error}"
        ) from error
    if below.adapter is not None:
        raise CheckpointError(f"{below.folder}, the base of {folder}, is an adapter itself; merge it first")
    return replace(below, adapter=folder)


def _find_base(folder: Path, base: str | Path | None, *, takes_tower: bool, offline: bool) -> tuple[Path, Weights]:
    """The base's folder and weights. Its tower counts only where a trained one is called for."""
    found = resolve_checkpoint(str(_base_name(folder, base)), offline=offline)
    weights = find_weights(found, ALL_PARTS if takes_tower else ALL_PARTS - {"tower"})
    if not has_model(found):
        raise CheckpointError(f"{found}, the base of {folder}, is not a complete model: it holds no weights of its own")
    return found, weights


def find_weights(folder: Path, parts: frozenset[Part] = ALL_PARTS) -> Weights:
    """A folder's own weights, whether or not it is a whole LLaVA: a text-only decoder has the originals' names."""
    is_llava_hf = isinstance(read_json(folder, "config.json").get("vision_config"), dict)
    return Weights(folder, from_llava_hf if is_llava_hf else from_original, parts)


def _base_name(folder: Path, base: str | Path | None) -> str | Path:
    if base is not None:
        return base
    named = None
    if (folder / "adapter_config.json").exists():
        named = read_json(folder, "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{folder} needs the model it was trained on; name it with --base")
    return named


def _check_base(config: ModelConfig, folder: Path, base: Path) -> None:
    """The fields that tell one size of a decoder from another."""
    theirs = read_json(base, "config.json")
    theirs = theirs.get("text_config", theirs)
    for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if field in theirs and field in config.text and theirs[field] != config.text[field]:
            raise CheckpointError(
                f"{base} is the wrong base for {folder}: its {field} is {theirs[field]}, "
                f"{folder / 'config.json'} says {config.text[field]}; name the right one with --base"
            )


def _with_tower(
    folder: Path, settings: JsonObject, weights: tuple[Weights, ...], *, offline: bool
) -> tuple[ModelConfig, Path | None, tuple[Weights, ...]]:
    """The configuration with its tower's, where pictures' settings are, and the weights with the tower's.

    As in the original code a tower inside the checkpoint or its base counts if it was trained
    (`unfreeze_mm_vision_tower`), else the one that is named, for which the copy inside stands in where it is not here.
    """
    name = tower_name(settings)
    if name == BIOVIL:
        return _with_biovil(folder, settings, weights)
    has_own = holds(weights, "tower")
    is_inside = has_own and _has_trained_tower(settings)
    try:
        source = find_tower(name, folder, is_inside=is_inside, offline=offline)
    except CheckpointError:
        if not has_own or is_inside:
            raise
        source, is_inside = find_tower(name, folder, is_inside=True, offline=offline), True
        logger.info("%s: the tower %s is not here; the copy inside the checkpoint is used", folder, name)
    with _naming(folder):
        config = read_original_config(settings, source.config)
    if is_inside or source.folder is None:
        return config, source.folder, weights
    tower = Weights(source.folder, from_tower)
    return config, source.folder, (tower, *without(weights, "tower"))


def _without_spare_newline(folder: Path, config: ModelConfig, weights: tuple[Weights, ...]) -> tuple[Weights, ...]:
    """Without an `image_newline` that nothing reads: training a LLaVA-1.6 further as `flat` saves it all the same."""
    if config.has_newline or not holds(weights, "newline"):
        return weights
    logger.info("%s: image_newline is not used with mm_patch_merge_type %s", folder, config.merge_type)
    return without(weights, "newline")


def _has_trained_tower(settings: JsonObject) -> bool:
    """Whether the tower that counts is among the model's own weights. RaDialog's is where its code puts it."""
    return bool(settings.get("unfreeze_mm_vision_tower")) and tower_name(settings) != BIOVIL


def _with_biovil(
    folder: Path, settings: JsonObject, weights: tuple[Weights, ...]
) -> tuple[ModelConfig, Path | None, tuple[Weights, ...]]:
    """RaDialog: the checkpoint brings its tower; the released file stands in for whatever of it was not trained."""
    with _naming(folder):
        config = read_original_config(settings, BIOVIL_CONFIG)
    if released := find_biovil_file(folder):
        weights = (Weights(folder, from_biovil, frozenset({"tower"}), released), *weights)
    of_tower = [each for each in weights if "tower" in each.parts]
    check_biovil(folder, {key.name for each in of_tower for key in each.keys().values() if key.part == "tower"})
    return config, None, weights


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Readers of configurations know fields and no folders: put the folder before what they raise."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def with_generation_config(config: ModelConfig, folder: Path) -> ModelConfig:
    """The tokens that end an answer are generation_config.json's where there is one."""
    if not (folder / "generation_config.json").exists():
        return config
    eos = read_json(folder, "generation_config.json").get("eos_token_id")
    return config if eos is None else replace(config, eos_token_ids=eos_token_ids({"eos_token_id": eos}))
