"""What a checkpoint's config.json says, read once into frozen dataclasses; bad values fail here, naming the field.

Standard library only. Reads the llava-hf dialect; the originals' is read by checkpoints/original_config.py into the
same ModelConfig. Knows nothing about files other than the dictionary it is given.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_core.errors import CheckpointError
from llava_core.types import Size

JsonObject = Mapping[str, Any]
SelectFeature = Literal["patch", "cls_patch"]
MergeType = Literal["flat", "spatial", "spatial_unpad"]
# Whose conventions a checkpoint follows where the two differ: transformers' own, or the original LLaVA code's.
Dialect = Literal["llava_hf", "original"]
# RaDialog's tower, which transformers does not have: the `model_type` is ours.
BIOVIL_T = "biovil_t"
_SELECT = {"default": "patch", "patch": "patch", "full": "cls_patch", "cls_patch": "cls_patch"}


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower. Sizes in pixels; `select_layer` indexes the hidden states, embedding output first.

    `architecture` is what transformers calls the tower's configuration, `model_type` in it says which class.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    select_layer: int
    select_feature: SelectFeature
    architecture: JsonObject

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size:
            raise CheckpointError(
                f"vision_config: image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )

    @property
    def patches_per_side(self) -> int:
        """Columns and rows of the patch grid. Towers leave out what is less than a patch: 384 pixels are 27 of 14."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Rows of features per tile: one per patch, and one where the class feature is kept."""
        return self.patches_per_side**2 + (1 if self.select_feature == "cls_patch" else 0)


@dataclass(frozen=True)
class ModelConfig:
    """A LLaVA: tower, projector and decoder. `context_length` is in tokens, image tokens included.

    With `pinpoints` a picture becomes an overview and tiles of the best of these resolutions, merged by `merge_type`.
    `tower_name` is a folder or hub id that the tower's weights come from, None where the checkpoint holds them. With
    `s2_scales`, in pixels, the tower reads a picture at each of them.
    """

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
    dialect: Dialect = "llava_hf"
    pinpoints: tuple[Size, ...] = ()
    merge_type: MergeType = "flat"
    image_start_end: bool = False
    tower_name: str | None = None
    s2_scales: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        projector_depth(self.projector_type)
        if self.merge_type not in ("flat", "spatial", "spatial_unpad"):
            raise CheckpointError(
                f"mm_patch_merge_type {self.merge_type!r} is unknown; known are flat, spatial and spatial_unpad"
            )
        if self.pinpoints and self.merge_type != "flat" and self.vision.select_feature == "cls_patch":
            raise CheckpointError(
                f"mm_patch_merge_type {self.merge_type} lays patches out as a picture, "
                "which mm_vision_select_feature cls_patch does not allow; use patch"
            )
        side = self.vision.image_size
        if any(min(size) < side or size.width % side or size.height % side for size in self.pinpoints):
            raise CheckpointError(
                f"image_grid_pinpoints {list(map(tuple, self.pinpoints))} are not multiples of {side}"
            )

    @property
    def tile_size(self) -> int:
        """The side in pixels of the tiles that the tower takes."""
        return max(self.s2_scales, default=self.vision.image_size)

    @property
    def has_newline(self) -> bool:
        """Whether the checkpoint holds the learned end-of-line vector, `image_newline`."""
        return self.merge_type == "spatial_unpad"


def read_llava_hf_config(config: JsonObject) -> ModelConfig:
    """The llava-hf dialect (`model_type: llava` or `llava_next`, with `vision_config` and `text_config`).

    Raises CheckpointError naming the field that is missing or not supported.
    """
    if not isinstance(config.get("vision_config"), dict) or not isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            "config.json has neither mm_vision_tower nor vision_config and text_config, so it describes no LLaVA, but "
            "perhaps a text-only model: name that as the base of an adapter or projector"
        )
    kind = config.get("model_type", "llava")
    if kind not in ("llava", "llava_next"):
        raise CheckpointError(f"config.json: model_type {kind!r} is not supported; known are llava and llava_next")
    text = text_config(config["text_config"], "text_config")
    activation = config.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"config.json: projector_hidden_act is {activation!r}; only 'gelu' is supported")
    return ModelConfig(
        vision=_vision_config(config),
        projector_type="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        text=text,
        hidden_size=count(text, "hidden_size", "text_config"),
        context_length=count(text, "max_position_embeddings", "text_config"),
        vocab_size=count(text, "vocab_size", "text_config"),
        image_token_id=config.get("image_token_index", config.get("image_token_id")),
        eos_token_ids=eos_token_ids(text),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        dtype=str(
            config.get("dtype", config.get("torch_dtype", text.get("dtype", text.get("torch_dtype", "float32"))))
        ),
        # transformers gives (height, width).
        pinpoints=read_pinpoints(config.get("image_grid_pinpoints") or _PINPOINTS, is_height_first=True)
        if kind == "llava_next"
        else (),
        merge_type="spatial_unpad" if kind == "llava_next" else "flat",
    )


def read_pinpoints(value: object, *, is_height_first: bool = False) -> tuple[Size, ...]:
    """`image_grid_pinpoints`: a list of pairs, or the same as text. Raises CheckpointError for anything else."""
    try:
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) else value
        sizes = tuple(Size(int(first), int(second)) for first, second in pairs)
    except (ValueError, TypeError, SyntaxError):
        sizes = ()
    if not sizes:
        raise CheckpointError(f"image_grid_pinpoints must be a list of pairs of pixels, not {value!r}")
    return tuple(Size(size.height, size.width) for size in sizes) if is_height_first else sizes


# What transformers may leave out of a saved configuration because it is the class's default.
_DECODER = {"hidden_size": 4096, "vocab_size": 32000, "num_hidden_layers": 32, "num_attention_heads": 32}
_TEXT_DEFAULTS: dict[str, JsonObject] = {
    "llama": {**_DECODER, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_DECODER,
        "intermediate_size": 14336,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
    },
}
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3, "image_size": 224}
_VISION_DEFAULTS: dict[str, JsonObject] = {
    "clip_vision_model": {**_TOWER, "patch_size": 32},
    "siglip_vision_model": {**_TOWER, "patch_size": 16},
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def projector_depth(kind: str) -> int:
    """Linear layers of a projector, by LLaVA's name for it. Raises CheckpointError for a name that is not known."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        return int(match.group(1))
    raise CheckpointError(f"mm_projector_type {kind!r} is unknown; known are linear, mlp<N>x_gelu and identity")


def text_config(text: JsonObject, where: str) -> JsonObject:
    """A decoder's configuration with its class's defaults. Raises CheckpointError for a decoder that is not ours."""
    decoder = text.get("model_type", "llama")
    if decoder not in _TEXT_DEFAULTS:
        known = ", ".join(_TEXT_DEFAULTS) + decoder_hint(decoder)
        raise CheckpointError(f"{where}: decoder {decoder!r} is not supported; known are {known}")
    return {"model_type": decoder, **_TEXT_DEFAULTS[decoder], **text}


def decoder_hint(decoder: object) -> str:
    """What to do about a decoder that is known and not supported."""
    if "mpt" not in str(decoder).lower():
        return ""
    return (
        "; MPT is left out because LLaVA's own code no longer runs it: use a LLaVA on Llama or Mistral, such as "
        "liuhaotian/llava-v1.5-7b"
    )


def eos_token_ids(text: JsonObject) -> tuple[int, ...]:
    """Every token that ends an answer. Raises CheckpointError when there is none."""
    eos = text.get("eos_token_id", 2)
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if not ids or not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"text_config: eos_token_id is {eos!r}; without one no answer would ever end")
    return ids


def count(values: JsonObject, name: str, where: str) -> int:
    """A positive whole number of the configuration."""
    value = values[name]
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {name} must be a positive whole number, not {value!r}")
    return value


def _vision_config(config: JsonObject) -> VisionConfig:
    select = str(config.get("vision_feature_select_strategy", "default"))
    if select not in _SELECT:
        raise CheckpointError(f"vision_feature_select_strategy {select!r} is unknown; known are {', '.join(_SELECT)}")
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(
            f"vision_feature_layer must be one number, not {layer!r}: several layers are not supported"
        )
    return build_vision_config(config["vision_config"], layer, select, "vision_feature_layer")


def build_vision_config(tower: JsonObject, layer: int, select: str, layer_field: str) -> VisionConfig:
    """A tower as its own configuration describes it; `select` in either dialect's words.

    Raises CheckpointError for a tower that is not supported, or that has no such layer.
    """
    kind = tower.get("model_type", "clip_vision_model")
    if kind == BIOVIL_T:
        # A ResNet has neither layers to choose from nor a class feature: config.json's fields for both mean nothing.
        return VisionConfig(448, 32, 512, -1, "patch", {"model_type": BIOVIL_T})
    if kind not in _VISION_DEFAULTS:
        raise CheckpointError(
            f"vision_config: tower {kind!r} is not supported; known are {', '.join(_VISION_DEFAULTS)}"
        )
    if kind == "siglip_vision_model":
        if select == "default":
            raise CheckpointError("vision_feature_select_strategy default drops a class feature; SigLIP has none: full")
        select = "patch" if select == "full" else select
    vision = {**_VISION_DEFAULTS[kind], **tower, "model_type": kind}
    num_layers = count(vision, "num_hidden_layers", "vision_config")
    if not -num_layers - 1 <= layer <= num_layers:
        raise CheckpointError(f"{layer_field} is {layer}, but the tower has {num_layers} layers")
    return VisionConfig(
        image_size=count(vision, "image_size", "vision_config"),
        patch_size=count(vision, "patch_size", "vision_config"),
        hidden_size=count(vision, "hidden_size", "vision_config"),
        select_layer=layer,
        select_feature="patch" if _SELECT[select] == "patch" else "cls_patch",
        architecture=vision,
    )
