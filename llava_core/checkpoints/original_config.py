"""The original LLaVA code's config.json (`mm_vision_tower` and the other `mm_` fields) to a ModelConfig and back.

Dispatches on fields alone: `model_type` does not help, because transformers gives one of its names another meaning.
Knows no files; layout.py finds the tower's own configuration.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast, get_args

from llava_core.architectures import DECODER_FIELDS, decoder_hint, read_decoder
from llava_core.config import (
    BIOVIL_T,
    JsonObject,
    MergeType,
    ModelConfig,
    build_vision_config,
    read_dtype,
    read_pinpoints,
)
from llava_core.errors import CheckpointError
from llava_core.fields import MOST, Fields, is_whole, shown


def is_original_config(config: JsonObject) -> bool:
    """Whether config.json is in the original code's dialect, that is, names a vision tower."""
    return bool(config.get("mm_vision_tower", config.get("vision_tower"))) and not isinstance(
        config.get("vision_config"), dict
    )


def tower_name(config: JsonObject) -> str:
    """The tower's folder or hub id. Raises CheckpointError when the field holds anything else."""
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"mm_vision_tower must name a folder or hub id, not {shown(name)}")
    return name


def read_original_config(config: JsonObject, tower: JsonObject) -> ModelConfig:
    """The model of an original config.json, whose tower has the configuration `tower`, as returned by `read_tower`.

    Raises CheckpointError naming a missing or unsupported field.
    """
    fields = Fields(config)
    text = read_decoder(Fields({"bos_token_id": 1, **config, "model_type": _decoder(fields)}))
    if tower["model_type"] == BIOVIL_T:
        _check_biovil(fields)
    scales = _s2_scales(fields)
    select = fields.choice("mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    layer = fields.whole("mm_vision_select_layer", -2, at_least=-MOST)
    vision = build_vision_config(tower, layer, select, "mm_vision_select_layer")
    vision = replace(vision, hidden_size=vision.hidden_size * max(1, len(scales)))
    expected = fields.count("mm_hidden_size", vision.hidden_size)
    if expected != vision.hidden_size:
        raise CheckpointError(
            f"mm_hidden_size is {expected}, but the tower {tower_name(config)} gives {vision.hidden_size} features at "
            f"{max(1, len(scales))} scales (s2); it is the wrong tower"
        )
    return ModelConfig(
        vision=vision,
        projector_type=fields.text("mm_projector_type", "linear"),
        projector_bias=True,
        text=text,
        hidden_size=text["hidden_size"],
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        image_token_id=None,
        eos_token_ids=Fields(text).tokens("eos_token_id"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=read_dtype(fields, "float16"),
        dialect="original",
        pinpoints=read_pinpoints(config.get("image_grid_pinpoints")) if is_anyres(fields) else (),
        merge_type=cast("MergeType", fields.choice("mm_patch_merge_type", get_args(MergeType), "flat")),
        image_start_end=fields.flag("mm_use_im_start_end", False),
        tower_name=tower_name(config),
        s2_scales=scales,
    )


def is_anyres(fields: Fields) -> bool:
    """Whether pictures are cut into tiles, according to `image_aspect_ratio`."""
    return fields.text("image_aspect_ratio", "square") == "anyres"


def _decoder(fields: Fields) -> str:
    """The decoder by `architectures`, or by `model_type` where the former is missing, as after other training code."""
    names = " ".join(map(str, fields.items("architectures")))
    if found := re.findall(r"(\w+)ForCausalLM", names):
        name, known = found[0].removeprefix("Llava"), {"Llama": "llama", "Mistral": "mistral"}
    else:
        name = fields.text("model_type", "llava")
        known = {"llava": "llama", "llava_llama": "llama", "llama": "llama"}
        known |= {"llava_mistral": "mistral", "mistral": "mistral"}
    if name not in known:
        raise CheckpointError(
            f"architectures {shown(names) if names else 'missing'}, model_type "
            f"{shown(fields.values.get('model_type'))}: the decoder {shown(name)} is not supported; "
            f"known are {', '.join(known)}{decoder_hint(name)}"
        )
    return known[name]


def check_image_pooling(config: JsonObject) -> None:
    """Raise CheckpointError where RaDialog's `mv_type` requires the network that pools several pictures into one."""
    kind = config.get("mv_type")
    # RaDialog's training writes `False` where the option is not given.
    if kind not in (None, False, "none", "concat"):
        raise CheckpointError(
            f"mv_type {shown(kind)} needs RaDialog's image pooler, which is not supported; use a checkpoint "
            "with mv_type 'concat'"
        )


def _check_biovil(fields: Fields) -> None:
    if is_anyres(fields):
        raise CheckpointError("image_aspect_ratio is anyres, but BioViL-T reads a picture as one tile")
    if fields.flag("s2", False):
        raise CheckpointError("s2 is set, but BioViL-T is read at one scale")


def _s2_scales(fields: Fields) -> tuple[int, ...]:
    """`s2_scales` in pixels, smallest first, where `s2` is set; the original's default is three times 336."""
    if not fields.flag("s2", False):
        return ()
    if is_anyres(fields):
        raise CheckpointError("s2 and image_aspect_ratio anyres exclude one another")
    value = fields.values.get("s2_scales", "336,672,1008")
    try:
        scales = [int(scale) for scale in value.split(",")] if isinstance(value, str) else list(value)
    except (ValueError, TypeError):
        scales = []
    if not scales or not all(is_whole(scale) and 0 < scale <= MOST for scale in scales):
        raise CheckpointError(f"s2_scales must be pixels, separated by commas, not {shown(value)}")
    return tuple(sorted(scales))


def original_json(config: ModelConfig, tower: str, aspect: str) -> JsonObject:
    """The config.json with which the original code, on transformers 4.37, loads a model that includes its tower.

    `tower` is the folder or hub id of the tower's configuration, `aspect` is `image_aspect_ratio`. Raises
    CheckpointError naming a field that the original cannot express.
    """
    if not config.projector_bias:
        raise CheckpointError("multimodal_projector_bias false cannot be expressed in the original's config.json")
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
    """The decoder's fields, with `rope_theta` and `rope_scaling` for transformers 5's `rope_parameters`."""
    fields = {name: config.text[name] for name in DECODER_FIELDS if name in config.text}
    rope = dict(fields.pop("rope_parameters", {}))
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        # transformers 4.37 reads `type`, and refuses the field if it holds anything besides `type` and `factor`.
        if set(rope) - {"rope_type", "type", "factor"}:
            raise CheckpointError(
                f"text_config: rope_parameters {rope} cannot be expressed in the original's config.json, "
                "which knows linear and dynamic scaling by a factor"
            )
        fields["rope_scaling"] = {"type": rope["rope_type"], "factor": rope.get("factor")}
    return fields
