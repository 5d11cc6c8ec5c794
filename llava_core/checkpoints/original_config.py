"""The original LLaVA code's config.json (`mm_vision_tower` and the other `mm_` fields) to a ModelConfig and back.

Dispatches on fields alone: `model_type` is no help, because transformers gives one of its names another meaning. Knows
no files; where the tower's own configuration comes from is layout.py's business.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from llava_core.config import (
    BIOVIL_T,
    JsonObject,
    MergeType,
    ModelConfig,
    build_vision_config,
    count,
    decoder_hint,
    eos_token_ids,
    read_pinpoints,
    text_config,
)
from llava_core.errors import CheckpointError

# What a decoder's configuration keeps of config.json; the rest is about pictures, training or generation.
_TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Null says no window; to a Mistral whose configuration is silent transformers gives one of 4096 tokens.
_NULLABLE = ("sliding_window",)


def is_original_config(config: JsonObject) -> bool:
    """Whether config.json is of the originals' dialect: it names a vision tower."""
    return bool(config.get("mm_vision_tower", config.get("vision_tower"))) and not isinstance(
        config.get("vision_config"), dict
    )


def tower_name(config: JsonObject) -> str:
    """The tower's folder or hub id. Raises CheckpointError when the field holds anything else."""
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"config.json: mm_vision_tower must name a folder or hub id, not {name!r}")
    return name


def read_original_config(config: JsonObject, tower: JsonObject) -> ModelConfig:
    """The model of an original config.json, whose tower has the configuration `tower` (transformers' form).

    Raises CheckpointError naming the field that is missing or not supported.
    """
    text = {"eos_token_id": 2, "bos_token_id": 1, **_text(config)}
    select = str(config.get("mm_vision_select_feature", "patch"))
    if select not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"config.json: mm_vision_select_feature {select!r} is unknown; known are patch and cls_patch"
        )
    layer = config.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"config.json: mm_vision_select_layer must be one number, not {layer!r}")
    if tower["model_type"] == BIOVIL_T:
        _check_biovil(config)
    scales = _s2_scales(config)
    vision = build_vision_config(tower, layer, select, "mm_vision_select_layer")
    vision = replace(vision, hidden_size=vision.hidden_size * max(1, len(scales)))
    expected = config.get("mm_hidden_size", vision.hidden_size)
    if expected != vision.hidden_size:
        raise CheckpointError(
            f"config.json: mm_hidden_size is {expected}, but the tower {tower_name(config)} gives "
            f"{vision.hidden_size} features; it is the wrong tower"
        )
    is_anyres = config.get("image_aspect_ratio") == "anyres"
    return ModelConfig(
        vision=vision,
        projector_type=_projector_type(config),
        projector_bias=True,
        text=text,
        hidden_size=count(text, "hidden_size", "config.json"),
        context_length=count(text, "max_position_embeddings", "config.json"),
        vocab_size=count(text, "vocab_size", "config.json"),
        image_token_id=None,
        eos_token_ids=eos_token_ids(text),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=str(config.get("dtype", config.get("torch_dtype", "float16"))),
        dialect="original",
        pinpoints=read_pinpoints(config.get("image_grid_pinpoints")) if is_anyres else (),
        merge_type=_merge_type(config),
        image_start_end=bool(config.get("mm_use_im_start_end", False)),
        tower_name=tower_name(config),
        s2_scales=scales,
    )


def _text(config: JsonObject) -> JsonObject:
    return text_config({**_text_fields(config), "model_type": _decoder(config)}, "config.json")


def _text_fields(config: JsonObject) -> dict[str, Any]:
    return {
        name: config[name]
        for name in _TEXT_FIELDS
        if name in config and (config[name] is not None or name in _NULLABLE)
    }


def _decoder(config: JsonObject) -> str:
    """By `architectures`, or by `model_type` where a hand or another training left that out."""
    names = " ".join(map(str, config.get("architectures") or ()))
    if found := re.findall(r"(\w+)ForCausalLM", names):
        name, known = found[0].removeprefix("Llava"), {"Llama": "llama", "Mistral": "mistral"}
    else:
        name = str(config.get("model_type", "llava"))
        known = {"llava": "llama", "llava_llama": "llama", "llama": "llama"}
        known |= {"llava_mistral": "mistral", "mistral": "mistral"}
    if name not in known:
        raise CheckpointError(
            f"config.json: architectures {names or 'missing'}, model_type {config.get('model_type')!r}: "
            f"the decoder {name!r} is not supported; known are {', '.join(known)}{decoder_hint(name)}"
        )
    return known[name]


def _projector_type(config: JsonObject) -> str:
    kind = config.get("mm_projector_type", "linear")
    if not isinstance(kind, str) or not re.fullmatch(r"linear|identity|mlp[1-9]\d*x_gelu", kind):
        raise CheckpointError(
            f"config.json: unknown mm_projector_type {kind!r}; known are linear, mlp<N>x_gelu and identity"
        )
    return kind


def check_image_pooling(config: JsonObject) -> None:
    """Raise CheckpointError where RaDialog's `mv_type` asks for the network that makes one picture's tokens of many."""
    kind = config.get("mv_type")
    # `False` is what its training writes where the option is not given.
    if kind not in (None, False, "none", "concat"):
        raise CheckpointError(
            f"config.json: mv_type {kind!r} needs RaDialog's image pooler, which is not supported; use a checkpoint "
            "with mv_type 'concat'"
        )


def _check_biovil(config: JsonObject) -> None:
    if config.get("image_aspect_ratio") == "anyres":
        raise CheckpointError("config.json: image_aspect_ratio is anyres, but BioViL-T reads a picture as one tile")
    if config.get("s2"):
        raise CheckpointError("config.json: s2 is set, but BioViL-T is read at one scale")


def _s2_scales(config: JsonObject) -> tuple[int, ...]:
    """`s2_scales` in pixels, smallest first, where `s2` is set; the original's default is three times 336."""
    if not config.get("s2"):
        return ()
    if config.get("image_aspect_ratio") == "anyres":
        raise CheckpointError("config.json: s2 and image_aspect_ratio anyres exclude one another")
    value = config.get("s2_scales", "336,672,1008")
    try:
        return tuple(sorted(int(scale) for scale in (value.split(",") if isinstance(value, str) else value)))
    except (ValueError, TypeError):
        raise CheckpointError(f"config.json: s2_scales must be pixels, separated by commas, not {value!r}") from None


def _merge_type(config: JsonObject) -> MergeType:
    kind = config.get("mm_patch_merge_type", "flat")
    if kind not in ("flat", "spatial", "spatial_unpad"):
        raise CheckpointError(
            f"config.json: unknown mm_patch_merge_type {kind!r}; known are flat, spatial and spatial_unpad"
        )
    merge: MergeType = kind
    return merge


def original_json(config: ModelConfig, tower: str, aspect: str) -> JsonObject:
    """The config.json with which the original code, transformers 4.37 under it, loads a model whose tower is inside.

    `tower` is the folder or hub id that the tower's configuration is found under, `aspect` is `image_aspect_ratio`.
    Raises CheckpointError naming the field for what the original has no words for.
    """
    if not config.projector_bias:
        raise CheckpointError("multimodal_projector_bias false cannot be said in the original's config.json")
    decoder = config.text["model_type"]
    eos = config.eos_token_ids
    return {
        "architectures": ["LlavaMistralForCausalLM" if decoder == "mistral" else "LlavaLlamaForCausalLM"],
        # Not `llava`, which transformers gives another meaning.
        "model_type": f"llava_{decoder}",
        **_original_text(config),
        "vocab_size": config.vocab_size,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": True,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_vision_select_feature": config.vision.select_feature,
        "mm_projector_type": config.projector_type,
        "mm_hidden_size": config.vision.hidden_size,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": config.merge_type,
        "use_mm_proj": True,
        "image_aspect_ratio": aspect,
        **({"image_grid_pinpoints": [list(size) for size in config.pinpoints]} if config.pinpoints else {}),
        "tokenizer_model_max_length": config.context_length,
        "tokenizer_padding_side": "right",
    }


def _original_text(config: ModelConfig) -> JsonObject:
    """The decoder's fields; transformers 5 keeps in `rope_parameters` what was `rope_theta` and `rope_scaling`."""
    fields = _text_fields(config.text)
    rope = dict(fields.pop("rope_parameters", {}))
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        # 4.37 knows `type`, and refuses the field with anything but `type` and `factor` in it.
        if set(rope) - {"rope_type", "type", "factor"}:
            raise CheckpointError(
                f"text_config: rope_parameters {rope} cannot be said in the original's config.json, "
                "which knows linear and dynamic scaling by a factor"
            )
        fields["rope_scaling"] = {"type": rope["rope_type"], "factor": rope.get("factor")}
    return fields
