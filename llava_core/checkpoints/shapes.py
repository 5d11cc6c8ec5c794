"""The name and shape of every tensor that a configuration calls for, restated from the architectures.

This lets a checkpoint be checked quickly and without torch; a test compares with the modules themselves. Knows no
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llava_core.checkpoints.keymaps import NEWLINE_KEY, Key
from llava_core.config import BIOVIL_T, JsonObject, ModelConfig, projector_depth
from llava_core.vision.biovil_keys import tensor_names

Shape = tuple[int, ...]


def expected_shapes(config: ModelConfig) -> dict[Key, Shape | None]:
    """Every tensor that the checkpoint must hold, by our key; None for BioViL-T's, which has one size only."""
    shapes: dict[Key, Shape | None] = {}
    if config.vision.architecture["model_type"] == BIOVIL_T:
        shapes |= {Key("tower", name): None for name in tensor_names()}
    else:
        shapes |= {Key("tower", f"model.{name}"): shape for name, shape in _tower(config.vision.architecture)}
    shapes |= {Key("projector", name): shape for name, shape in _projector(config)}
    shapes |= {Key("decoder", name): shape for name, shape in _decoder(config)}
    if config.has_newline:
        shapes[NEWLINE_KEY] = (config.hidden_size,)
    return shapes


def decoder_fields(config: ModelConfig) -> dict[str, Any]:
    """The decoder's configuration, completed by the two fields that are derived from others where left out."""
    text = dict(config.text)
    if text.get("num_key_value_heads") is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if text.get("head_dim") is None:
        text["head_dim"] = config.hidden_size // text["num_attention_heads"]
    return text


def _decoder(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    text = decoder_fields(config)
    hidden, inner = config.hidden_size, text["intermediate_size"]
    queries, keys = (text[name] * text["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    is_llama = text["model_type"] == "llama"
    attention_bias, mlp_bias = (is_llama and bool(text.get(name)) for name in ("attention_bias", "mlp_bias"))
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(text["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        yield from _linear(f"{name}.self_attn.q_proj", hidden, queries, bias=attention_bias)
        yield from _linear(f"{name}.self_attn.k_proj", hidden, keys, bias=attention_bias)
        yield from _linear(f"{name}.self_attn.v_proj", hidden, keys, bias=attention_bias)
        yield from _linear(f"{name}.self_attn.o_proj", queries, hidden, bias=attention_bias)
        yield from _linear(f"{name}.mlp.gate_proj", hidden, inner, bias=mlp_bias)
        yield from _linear(f"{name}.mlp.up_proj", hidden, inner, bias=mlp_bias)
        yield from _linear(f"{name}.mlp.down_proj", inner, hidden, bias=mlp_bias)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def _projector(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    for index in range(projector_depth(config.projector_type)):
        columns = config.hidden_size if index else config.vision.hidden_size
        yield from _linear(str(2 * index), columns, config.hidden_size, bias=config.projector_bias)


def _tower(tower: JsonObject) -> Iterator[tuple[str, Shape]]:
    hidden, inner, patch = (tower[name] for name in ("hidden_size", "intermediate_size", "patch_size"))
    is_clip = tower["model_type"] == "clip_vision_model"
    num_patches = (tower["image_size"] // patch) ** 2
    yield "embeddings.patch_embedding.weight", (hidden, tower["num_channels"], patch, patch)
    yield "embeddings.position_embedding.weight", (num_patches + is_clip, hidden)
    if is_clip:
        yield "embeddings.class_embedding", (hidden,)
        yield from _norm("pre_layrnorm", hidden)
    else:
        yield "embeddings.patch_embedding.bias", (hidden,)
    for layer in range(tower["num_hidden_layers"]):
        name = f"encoder.layers.{layer}"
        yield from _norm(f"{name}.layer_norm1", hidden)
        yield from _norm(f"{name}.layer_norm2", hidden)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{projection}", hidden, hidden, bias=True)
        yield from _mlp(f"{name}.mlp", hidden, inner)
    yield from _norm("post_layernorm", hidden)
    if not is_clip and tower.get("vision_use_head", True):
        yield from _pooling_head(hidden, inner)


def _pooling_head(hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield "head.probe", (1, 1, hidden)
    yield "head.attention.in_proj_weight", (3 * hidden, hidden)
    yield "head.attention.in_proj_bias", (3 * hidden,)
    yield from _linear("head.attention.out_proj", hidden, hidden, bias=True)
    yield from _norm("head.layernorm", hidden)
    yield from _mlp("head.mlp", hidden, inner)


def _mlp(name: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{name}.fc1", hidden, inner, bias=True)
    yield from _linear(f"{name}.fc2", inner, hidden, bias=True)


def _norm(name: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _linear(name: str, columns: int, rows: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
