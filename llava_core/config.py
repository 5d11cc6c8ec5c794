"""What a checkpoint's config.json says, read once into frozen dataclasses; bad values fail here, naming the field.

Standard library only. Reads the llava-hf dialect. Knows nothing about files other than the dictionary it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_core.errors import CheckpointError

JsonObject = Mapping[str, Any]
SelectFeature = Literal["patch", "cls_patch"]
_SELECT = {"default": "patch", "patch": "patch", "full": "cls_patch", "cls_patch": "cls_patch"}


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP-type tower. Sizes in pixels; `select_layer` indexes the hidden states, embedding output first."""

    image_size: int
    patch_size: int
    hidden_size: int
    select_layer: int
    select_feature: SelectFeature
    architecture: JsonObject

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise CheckpointError(
                f"vision_config: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def patches_per_side(self) -> int:
        """Columns and rows of the patch grid."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    """A LLaVA: tower, projector and decoder. `context_length` is in tokens, image tokens included."""

    vision: VisionConfig
    projector_type: str
    projector_bias: bool
    text: JsonObject
    hidden_size: int
    context_length: int
    vocab_size: int
    image_token_id: int | None
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    dtype: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", self.projector_type):
            raise CheckpointError(
                f"unknown projector type {self.projector_type!r}; known are linear, mlp<N>x_gelu and identity"
            )


def read_llava_hf_config(config: JsonObject) -> ModelConfig:
    """The llava-hf dialect (`model_type: llava` with `vision_config` and `text_config`).

    Raises CheckpointError naming the field that is missing or not supported.
    """
    if not isinstance(config.get("vision_config"), dict) or not isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            "config.json has no vision_config or text_config, so this is not a llava-hf checkpoint; "
            "other layouts are not supported yet"
        )
    text = _text_config(config["text_config"])
    activation = config.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"config.json: projector_hidden_act is {activation!r}; only 'gelu' is supported")
    return ModelConfig(
        vision=_vision_config(config),
        projector_type="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        text=text,
        hidden_size=_count(text, "hidden_size", "text_config"),
        context_length=_count(text, "max_position_embeddings", "text_config"),
        vocab_size=_count(text, "vocab_size", "text_config"),
        image_token_id=config.get("image_token_index", config.get("image_token_id")),
        eos_token_ids=_eos_token_ids(text),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        dtype=str(
            config.get("dtype", config.get("torch_dtype", text.get("dtype", text.get("torch_dtype", "float32"))))
        ),
    )


# What transformers may leave out of a saved configuration because it is the class's default.
_TEXT_DEFAULTS: dict[str, JsonObject] = {
    "llama": {"hidden_size": 4096, "max_position_embeddings": 2048, "vocab_size": 32000},
    "mistral": {"hidden_size": 4096, "max_position_embeddings": 131_072, "vocab_size": 32000},
}
_VISION_DEFAULTS: JsonObject = {"hidden_size": 768, "image_size": 224, "patch_size": 32, "num_hidden_layers": 12}


def _text_config(text: JsonObject) -> JsonObject:
    decoder = text.get("model_type", "llama")
    if decoder not in _TEXT_DEFAULTS:
        raise CheckpointError(
            f"text_config: decoder {decoder!r} is not supported; known are {', '.join(_TEXT_DEFAULTS)}"
        )
    return {"model_type": decoder, **_TEXT_DEFAULTS[decoder], **text}


def _eos_token_ids(text: JsonObject) -> tuple[int, ...]:
    eos = text.get("eos_token_id", 2)
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"text_config: eos_token_id is {eos!r}; without one no answer would ever end")
    return ids


def _count(values: JsonObject, name: str, where: str) -> int:
    """A positive whole number of the configuration."""
    value = values[name]
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {name} must be a positive whole number, not {value!r}")
    return value


def _vision_config(config: JsonObject) -> VisionConfig:
    vision = {**_VISION_DEFAULTS, **config["vision_config"]}
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise CheckpointError(f"vision_config: tower {kind!r} is not supported; known is clip_vision_model")
    select = str(config.get("vision_feature_select_strategy", "default"))
    if select not in _SELECT:
        raise CheckpointError(f"vision_feature_select_strategy {select!r} is unknown; known are {', '.join(_SELECT)}")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(
            f"vision_feature_layer must be one number, not {layer!r}: several layers are not supported"
        )
    num_layers = _count(vision, "num_hidden_layers", "vision_config")
    if not -num_layers - 1 <= layer <= num_layers:
        raise CheckpointError(f"vision_feature_layer is {layer}, but the tower has {num_layers} layers")
    return VisionConfig(
        image_size=_count(vision, "image_size", "vision_config"),
        patch_size=_count(vision, "patch_size", "vision_config"),
        hidden_size=_count(vision, "hidden_size", "vision_config"),
        select_layer=layer,
        select_feature="patch" if _SELECT[select] == "patch" else "cls_patch",
        architecture=dict(vision),
    )
