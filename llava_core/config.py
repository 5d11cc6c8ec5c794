"""A checkpoint's config.json, read once into frozen dataclasses; bad values fail here, naming the field.

Standard library only. Reads the llava-hf dialect; checkpoints/original_config.py reads the original code's dialect into
the same ModelConfig. Knows no files: the caller that opened one prefixes its name to the errors raised here.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any, Literal

from llava_core.architectures import read_decoder, read_tower
from llava_core.errors import CheckpointError
from llava_core.fields import MOST, Fields, is_whole, shown
from llava_core.fields import JsonObject as JsonObject
from llava_core.types import Size

SelectFeature = Literal["patch", "cls_patch"]
MergeType = Literal["flat", "spatial", "spatial_unpad"]
# Which conventions a checkpoint follows where the two differ: transformers' or the original LLaVA code's.
Dialect = Literal["llava_hf", "original"]
# RaDialog's tower, which transformers does not have: the `model_type` is ours.
BIOVIL_T = "biovil_t"
_SELECT = {"default": "patch", "patch": "patch", "full": "cls_patch", "cls_patch": "cls_patch"}


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower. Sizes in pixels; `select_layer` indexes the hidden states, embedding output first.

    `architecture` is the tower's configuration as transformers has it; its `model_type` selects the class.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    select_layer: int
    select_feature: SelectFeature
    architecture: JsonObject

    @property
    def patches_per_side(self) -> int:
        """Columns and rows of the patch grid. Towers drop a partial patch: 384 pixels are 27 patches of 14."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Rows of features per tile: one per patch, and one where the class feature is kept."""
        return self.patches_per_side**2 + (1 if self.select_feature == "cls_patch" else 0)


@dataclass(frozen=True)
class ModelConfig:
    """A LLaVA: tower, projector and decoder. `context_length` is in tokens, image tokens included.

    With `pinpoints`, a picture becomes an overview and tiles at the best of these resolutions, merged by `merge_type`.
    `tower_name` is the folder or hub id that the tower's weights come from, None where the checkpoint holds them. With
    `s2_scales`, in pixels, the tower reads a picture at each scale.
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
        if outside := [token for token in self.eos_token_ids if token >= self.vocab_size]:
            raise CheckpointError(
                f"eos_token_id is {outside[0]}, but vocab_size is {self.vocab_size}: no answer would ever end with it"
            )
        if self.vision.tokens_per_tile >= self.context_length:
            raise CheckpointError(
                f"image_size {self.vision.image_size} and patch_size {self.vision.patch_size} make a picture "
                f"{self.vision.tokens_per_tile} tokens, but max_position_embeddings is {self.context_length}"
            )
        if self.pinpoints and self.merge_type != "flat" and self.vision.select_feature == "cls_patch":
            raise CheckpointError(
                f"mm_patch_merge_type {self.merge_type} lays patches out as a picture, "
                "which mm_vision_select_feature cls_patch does not allow; use patch"
            )
        side = self.vision.image_size
        if any(min(size) < side or size.width % side or size.height % side for size in self.pinpoints):
            raise CheckpointError(
                f"image_grid_pinpoints {shown(list(map(tuple, self.pinpoints)))} are not multiples of {side}"
            )

    @property
    def tile_size(self) -> int:
        """Side length in pixels of the tower's input tiles."""
        return max(self.s2_scales, default=self.vision.image_size)

    @property
    def has_newline(self) -> bool:
        """Whether the checkpoint holds the learned end-of-line vector, `image_newline`."""
        return self.merge_type == "spatial_unpad"


def read_llava_hf_config(config: JsonObject) -> ModelConfig:
    """The llava-hf dialect (`model_type: llava` or `llava_next`, with `vision_config` and `text_config`).

    Raises CheckpointError naming a missing or unsupported field.
    """
    if not isinstance(config.get("vision_config"), dict) or not isinstance(config.get("text_config"), dict):
        raise CheckpointError(
            "there is neither mm_vision_tower nor vision_config and text_config, so it describes no LLaVA, but "
            "perhaps a text-only model: name that as the base of an adapter or projector"
        )
    fields = Fields(config)
    kind = fields.text("model_type", "llava")
    if kind not in ("llava", "llava_next"):
        raise CheckpointError(f"model_type {kind!r} is not supported; known are llava and llava_next")
    activation = fields.text("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"projector_hidden_act is {activation!r}; only 'gelu' is supported")
    inner = fields.section("text_config")
    text = read_decoder(inner)
    image_token = fields.optional("image_token_index", Fields.whole)
    return ModelConfig(
        vision=_vision_config(fields),
        projector_type="mlp2x_gelu",
        projector_bias=fields.flag("multimodal_projector_bias", True),
        text=text,
        hidden_size=text["hidden_size"],
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        image_token_id=fields.optional("image_token_id", Fields.whole) if image_token is None else image_token,
        eos_token_ids=Fields(text).tokens("eos_token_id"),
        tie_word_embeddings=inner.flag("tie_word_embeddings", fields.flag("tie_word_embeddings", False)),
        dtype=read_dtype(fields, read_dtype(inner, "float32")),
        # transformers gives (height, width).
        pinpoints=read_pinpoints(fields.values.get("image_grid_pinpoints") or _PINPOINTS, is_height_first=True)
        if kind == "llava_next"
        else (),
        merge_type="spatial_unpad" if kind == "llava_next" else "flat",
    )


# The default of transformers' LlavaNextConfig.
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def read_pinpoints(value: object, *, is_height_first: bool = False) -> tuple[Size, ...]:
    """`image_grid_pinpoints`: a list of pairs, or the same as text. Raises CheckpointError for anything else."""
    try:
        pairs: Any = ast.literal_eval(value) if isinstance(value, str) else value
        sizes = tuple(Size(first, second) for first, second in pairs)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        sizes = ()
    if not sizes or not all(is_whole(side) for size in sizes for side in size):
        raise CheckpointError(f"image_grid_pinpoints must be a list of pairs of pixels, not {shown(value)}")
    return tuple(Size(size.height, size.width) for size in sizes) if is_height_first else sizes


def projector_depth(kind: str) -> int:
    """Number of linear layers in a projector, by LLaVA's name for it. Raises CheckpointError for an unknown name."""
    if kind in ("identity", "linear"):
        return int(kind == "linear")
    if match := re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind):
        return int(match.group(1))
    raise CheckpointError(f"mm_projector_type {shown(kind)} is unknown; known are linear, mlp<N>x_gelu and identity")


def read_dtype(fields: Fields, default: str) -> str:
    """The dtype the weights were saved in, under transformers' new name for the field or its old one."""
    known = ("float32", "float16", "bfloat16", "float64")
    return fields.choice("dtype", known, fields.choice("torch_dtype", known, default))


def _vision_config(fields: Fields) -> VisionConfig:
    select = fields.choice("vision_feature_select_strategy", _SELECT, "default")
    if isinstance(fields.values.get("vision_feature_layer"), list):
        raise fields.wrong("vision_feature_layer", "one number, for several layers are not supported")
    layer = fields.whole("vision_feature_layer", -2, at_least=-MOST)
    tower = fields.section("vision_config")
    is_biovil = tower.values.get("model_type") == BIOVIL_T
    architecture = {"model_type": BIOVIL_T} if is_biovil else read_tower(tower)
    return build_vision_config(architecture, layer, select, "vision_feature_layer")


def build_vision_config(tower: JsonObject, layer: int, select: str, layer_field: str) -> VisionConfig:
    """The tower with a configuration from `read_tower`; `select` may be in either dialect's terms.

    Raises CheckpointError for a layer or features that the tower does not have.
    """
    kind = tower["model_type"]
    if kind == BIOVIL_T:
        # A ResNet has neither layers to choose from nor a class feature: config.json's fields for both are meaningless.
        return VisionConfig(448, 32, 512, -1, "patch", {"model_type": BIOVIL_T})
    if kind == "siglip_vision_model":
        if select == "default":
            raise CheckpointError("vision_feature_select_strategy default drops a class feature; SigLIP has none: full")
        select = "patch" if select == "full" else select
    num_layers = tower["num_hidden_layers"]
    if not -num_layers - 1 <= layer <= num_layers:
        raise CheckpointError(f"{layer_field} is {layer}, but the tower has {num_layers} layers")
    return VisionConfig(
        image_size=tower["image_size"],
        patch_size=tower["patch_size"],
        hidden_size=tower["hidden_size"],
        select_layer=layer,
        select_feature="patch" if _SELECT[select] == "patch" else "cls_patch",
        architecture=tower,
    )
