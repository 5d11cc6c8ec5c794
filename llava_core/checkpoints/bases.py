"""Finds the base model that a LoRA, a projector or an adapter was trained on, and checks that it is the right one.

Reads configurations and headers, no weights. Knows nothing about towers or how the weights are combined.
"""

from __future__ import annotations

from pathlib import Path

from llava_core.checkpoints.files import has_model, naming, read_json
from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.original_config import is_original_config
from llava_core.checkpoints.weights import ALL_PARTS, Weights, find_weights
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError
from llava_core.fields import Fields, shown


def find_base(folder: Path, base: str | Path | None, hub: Hub, *, takes_tower: bool) -> tuple[Path, Weights]:
    """The base's folder and weights. Its tower is used only where a trained one is called for."""
    found = hub.find(str(base_name(folder, base)), f"the base of {folder}")
    weights = find_weights(found, ALL_PARTS if takes_tower else ALL_PARTS - {"tower"})
    if not has_model(found):
        raise CheckpointError(f"{found}, the base of {folder}, is not a complete model: it holds no weights of its own")
    return found, weights


def base_name(folder: Path, base: str | Path | None) -> str | Path:
    """The given base, else the one that adapter_config.json names. Raises CheckpointError without either."""
    if base is not None:
        return base
    said, named = "", None
    if (folder / "adapter_config.json").exists():
        named = read_json(folder, "adapter_config.json").get("base_model_name_or_path")
        said = f", and base_model_name_or_path in its adapter_config.json is {shown(named)}"
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{folder} needs the model it was trained on{said}; name it with --base")
    return named


def check_base(config: ModelConfig, folder: Path, base: Path) -> None:
    """Raise CheckpointError when the decoders differ in a field that determines their size."""
    theirs = read_json(base, "config.json")
    with naming(base / "config.json"):
        fields = Fields(theirs).section("text_config") if "text_config" in theirs else Fields(theirs)
    for field in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if fields.has(field) and fields.values[field] != config.text[field]:
            raise CheckpointError(
                f"{base} is the wrong base for {folder}: its {field} is {shown(fields.values[field])}, "
                f"{folder / 'config.json'} says {config.text[field]}; name the right one with --base"
            )


def check_trained_alone(folder: Path, base: Path, layout: str) -> None:
    """Raise CheckpointError for an adapter that was trained together with a projector, which is missing; `layout` is
    the base's."""
    reason = None
    if (folder / "config.json").exists() and is_original_config(read_json(folder, "config.json")):
        reason = (
            "its config.json is that of a LLaVA; copy the file here as well, or remove config.json if there is none"
        )
    elif layout == "text-only":
        reason = f"its base {base} is a language model, which has none; take the training's final output"
    elif layout == "original" and (folder / "trainer_state.json").exists():
        # transformers' Trainer leaves the same files for an adapter alone, but over a llava-hf model.
        reason = (
            "trainer_state.json says that it is from within a training, and LLaVA's code saves the projector at the "
            "end; resume the training, or remove trainer_state.json if the projector was not trained"
        )
    if reason is not None:
        raise CheckpointError(
            f"{folder} lacks non_lora_trainables.bin, which holds the projector that was trained with the adapter: "
            f"{reason}"
        )
