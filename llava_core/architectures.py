"""The configuration fields of decoders and towers: how each is read, and transformers' default where it is left out.

One table per kind lists the fields that change what is computed and how each is read; all other fields are ignored, so
their contents do no harm. Standard library only; a test compares the tables with transformers' classes. Knows nothing
about what a LLaVA adds to the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llava_core.errors import CheckpointError
from llava_core.fields import Fields, JsonObject

# Enough for every existing model, and few enough that enumerating their tensors stays fast.
_MOST_LAYERS = 1000
# A tile with more pixels per side would not fit into any memory.
_MOST_PIXELS = 2**14
_ACTIVATIONS = ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")

_Reader = Callable[[Fields, str], object]


def _activation(fields: Fields, name: str) -> str:
    return fields.choice(name, _ACTIVATIONS)


def _layers(fields: Fields, name: str) -> int:
    return fields.count(name, at_most=_MOST_LAYERS)


def _end(fields: Fields, name: str) -> object:
    fields.tokens(name)
    return fields.values[name]


def _colours(fields: Fields, name: str) -> int:
    if fields.whole(name) != 3:
        raise fields.wrong(name, "3")
    return 3


def _pixels(fields: Fields, name: str) -> int:
    return fields.count(name, at_most=_MOST_PIXELS)


_ROPE_NUMBERS = (
    "factor",
    "rope_theta",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
# The fields that each RoPE scaling type requires.
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _rope(fields: Fields, name: str) -> JsonObject:
    """`rope_scaling` or `rope_parameters`: numbers, and a type under its old or its new name."""
    rope = fields.section(name)
    read: dict[str, object] = {key: rope.positive(key) for key in _ROPE_NUMBERS if rope.has(key)}
    if rope.has("original_max_position_embeddings"):
        read["original_max_position_embeddings"] = rope.count("original_max_position_embeddings")
    if rope.has("truncate"):
        read["truncate"] = rope.flag("truncate")
    read |= {key: rope.choice(key, _ROPE_NEEDS) for key in ("type", "rope_type") if rope.has(key)}
    for needed in _ROPE_NEEDS[str(read.get("rope_type", read.get("type", "default")))]:
        rope.positive(needed)
    return read


# Llama and Mistral.
DECODER_FIELDS: Mapping[str, _Reader] = {
    "hidden_size": Fields.count,
    "intermediate_size": Fields.count,
    "num_hidden_layers": _layers,
    "num_attention_heads": Fields.count,
    "num_key_value_heads": Fields.count,
    "head_dim": Fields.count,
    "hidden_act": _activation,
    "max_position_embeddings": Fields.count,
    "initializer_range": Fields.fraction,
    "rms_norm_eps": Fields.positive,
    "rope_theta": Fields.positive,
    "rope_scaling": _rope,
    "rope_parameters": _rope,
    "sliding_window": Fields.count,
    "attention_bias": Fields.flag,
    "attention_dropout": Fields.fraction,
    "mlp_bias": Fields.flag,
    "vocab_size": Fields.count,
    "bos_token_id": Fields.whole,
    "eos_token_id": _end,
    # Released configurations have -1 for no padding token.
    "pad_token_id": lambda fields, name: fields.whole(name, at_least=-1),
}
# Class defaults, which transformers may leave out of a saved configuration.
_DECODER = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "eos_token_id": 2,
}
_DECODER_DEFAULTS: Mapping[str, JsonObject] = {
    "llama": {**_DECODER, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {**_DECODER, "intermediate_size": 14336, "max_position_embeddings": 131_072},
}

# CLIP and SigLIP.
TOWER_FIELDS: Mapping[str, _Reader] = {
    "hidden_size": Fields.count,
    "intermediate_size": Fields.count,
    "projection_dim": Fields.count,
    "num_hidden_layers": _layers,
    "num_attention_heads": Fields.count,
    "num_channels": _colours,
    "image_size": _pixels,
    "patch_size": _pixels,
    "hidden_act": _activation,
    "layer_norm_eps": Fields.positive,
    "attention_dropout": Fields.fraction,
    "initializer_range": Fields.fraction,
    "initializer_factor": Fields.positive,
    "vision_use_head": Fields.flag,
}
_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_TOWER_DEFAULTS: Mapping[str, JsonObject] = {
    "clip_vision_model": {**_TOWER, "patch_size": 32},
    "siglip_vision_model": {**_TOWER, "patch_size": 16},
}


def read_decoder(fields: Fields) -> JsonObject:
    """A decoder's configuration with its class's defaults. Raises CheckpointError for an unsupported decoder."""
    kind = fields.text("model_type", "llama")
    if kind not in _DECODER_DEFAULTS:
        known = ", ".join(_DECODER_DEFAULTS) + decoder_hint(kind)
        raise CheckpointError(f"{fields.path}model_type: decoder {kind!r} is not supported; known are {known}")
    read = _read(fields, DECODER_FIELDS, _DECODER_DEFAULTS[kind])
    if kind == "mistral":
        # For these two fields, null and absent mean different things.
        if "num_key_value_heads" not in fields.values:
            read["num_key_value_heads"] = 8
        if "sliding_window" in fields.values:
            read.setdefault("sliding_window", None)
    read.setdefault("num_key_value_heads", read["num_attention_heads"])
    _check_heads(read, fields.path, needs_even_split=kind == "llama" or "head_dim" not in read)
    pad, rows = read.get("pad_token_id", 0), read["vocab_size"]
    if pad >= rows:
        raise CheckpointError(f"{fields.path}pad_token_id is {pad}, but vocab_size is {rows}")
    return {"model_type": kind, **read}


def decoder_hint(decoder: str) -> str:
    """What to do about a decoder that is known but not supported; empty for any other."""
    if "mpt" not in decoder.lower():
        return ""
    return (
        "; MPT is left out because LLaVA's own code no longer runs it: use a LLaVA on Llama or Mistral, such as "
        "liuhaotian/llava-v1.5-7b"
    )


def read_tower(fields: Fields) -> JsonObject:
    """A tower's configuration with its class's defaults. Raises CheckpointError for an unsupported tower."""
    kind = fields.text("model_type", "clip_vision_model")
    if kind not in _TOWER_DEFAULTS:
        known = ", ".join(_TOWER_DEFAULTS)
        raise CheckpointError(f"{fields.path}model_type: tower {kind!r} is not supported; known are {known}")
    read = _read(fields, TOWER_FIELDS, _TOWER_DEFAULTS[kind])
    if read["image_size"] < read["patch_size"]:
        raise CheckpointError(
            f"{fields.path}image_size {read['image_size']} is smaller than patch_size {read['patch_size']}"
        )
    if read["hidden_size"] % read["num_attention_heads"]:
        raise CheckpointError(_not_even(read, fields.path))
    return {"model_type": kind, **read}


def _read(fields: Fields, table: Mapping[str, _Reader], defaults: JsonObject) -> dict[str, Any]:
    """The table's fields. One with a default must not be null: transformers does not replace null by the default."""
    merged = Fields({**defaults, **fields.values}, fields.path)
    names = [name for name in table if merged.has(name) or name in defaults]
    return {name: table[name](merged, name) for name in names}


def _check_heads(decoder: JsonObject, path: str, *, needs_even_split: bool) -> None:
    hidden, heads = decoder["hidden_size"], decoder["num_attention_heads"]
    if needs_even_split and hidden % heads:
        raise CheckpointError(_not_even(decoder, path))
    groups = decoder["num_key_value_heads"]
    if heads % groups:
        raise CheckpointError(f"{path}num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    width = decoder.get("head_dim", hidden // heads)
    if width % 2:
        raise CheckpointError(
            f"{path}num_attention_heads: {heads} heads (where none are given, {_DECODER['num_attention_heads']}) have "
            f"{width} numbers each, but rotary positions need pairs: the number must be even"
        )


def _not_even(fields: JsonObject, path: str) -> str:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    return f"{path}num_attention_heads {heads} does not divide hidden_size {hidden}"
