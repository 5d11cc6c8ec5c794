"""config.json: which fields are read, which defaults apply, and that every unsupported value is refused by name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from llava_core.config import projector_depth, read_llava_hf_config
from llava_core.errors import CheckpointError

# From llava-hf/llava-1.5-7b-hf: the decoder's sizes are transformers' defaults and therefore absent.
LLAVA_1_5_7B: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def changed(section: str | None = None, **values: Any) -> dict[str, Any]:
    config = copy.deepcopy(LLAVA_1_5_7B)
    (config if section is None else config[section]).update(values)
    return config


def test_a_hub_config_is_read_with_the_decoders_defaults() -> None:
    config = read_llava_hf_config(LLAVA_1_5_7B)
    assert (config.vision.image_size, config.vision.patches_per_side, config.vision.hidden_size) == (336, 24, 1024)
    assert (config.vision.select_layer, config.vision.select_feature) == (-2, "patch")
    assert (config.hidden_size, config.context_length, config.vocab_size) == (4096, 4096, 32064)
    assert (config.projector_type, config.projector_bias) == ("mlp2x_gelu", True)
    assert (config.image_token_id, config.eos_token_ids) == (32000, (2,))
    assert (config.tie_word_embeddings, config.dtype) == (False, "float16")


def test_a_config_saved_by_transformers_is_read(tiny_checkpoint: Path) -> None:
    config = read_llava_hf_config(json.loads((tiny_checkpoint / "config.json").read_text()))
    assert (config.vision.image_size, config.hidden_size, config.context_length) == (28, 32, 512)


def test_each_decoder_has_its_own_defaults() -> None:
    minimal = {"model_type": "mistral"}
    assert read_llava_hf_config({**LLAVA_1_5_7B, "text_config": minimal}).context_length == 131_072
    assert read_llava_hf_config({**LLAVA_1_5_7B, "text_config": {}}).context_length == 2048


@pytest.mark.parametrize(("kind", "depth"), [("identity", 0), ("linear", 1), ("mlp1x_gelu", 1), ("mlp12x_gelu", 12)])
def test_a_projectors_depth_follows_from_its_name(kind: str, depth: int) -> None:
    assert projector_depth(kind) == depth


@pytest.mark.parametrize("kind", ["", "mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu ", "resampler"])
def test_an_unknown_projector_is_refused(kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"mm_projector_type '{kind}' is unknown; known are linear, mlp<N>x_gelu"):
        projector_depth(kind)


def test_full_selection_keeps_the_class_feature() -> None:
    config = read_llava_hf_config(changed(vision_feature_select_strategy="full"))
    assert config.vision.select_feature == "cls_patch"


def test_several_end_tokens_are_kept() -> None:
    assert read_llava_hf_config(changed("text_config", eos_token_id=[2, 7])).eos_token_ids == (2, 7)


def test_tied_embeddings_are_read_from_either_level() -> None:
    assert read_llava_hf_config(changed("text_config", tie_word_embeddings=True)).tie_word_embeddings
    assert read_llava_hf_config(changed(tie_word_embeddings=True)).tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "llama"}, "neither mm_vision_tower nor vision_config and text_config"),
        (changed(vision_config=None), "describes no LLaVA"),
        (changed("text_config", model_type="gpt2"), "'gpt2'.*llama, mistral"),
        (changed("vision_config", model_type="vit"), "'vit' is not supported"),
        (changed("text_config", model_type="mpt"), "decoder 'mpt' is not supported.*use a LLaVA on Llama"),
        (changed("vision_config", patch_size=400), "336 is smaller than patch_size 400"),
        (
            changed("vision_config", patch_size=0),
            r"vision_config\.patch_size must be a whole number from 1 .*not 0",
        ),
        (
            changed("vision_config", image_size="large"),
            r"vision_config\.image_size must be .* not 'large'",
        ),
        (changed("text_config", vocab_size=None), r"text_config\.vocab_size must be a whole number .*, not None"),
        (
            changed("text_config", eos_token_id=None),
            r"text_config\.eos_token_id must be a token's number or a list",
        ),
        (changed("text_config", eos_token_id=[]), "eos_token_id"),
        (changed("text_config", eos_token_id=[2, 32064]), "eos_token_id is 32064, but vocab_size is 32064"),
        (changed("text_config", max_position_embeddings=576), "make a picture 576 tokens, but max_position_embeddings"),
        (changed(vision_feature_layer=[-2, -5]), r"one number.*, not \[-2, -5\]"),
        (changed(vision_feature_layer=-30), "-30, but the tower has 24 layers"),
        (changed(vision_feature_select_strategy="mean"), "'mean'.*default"),
        (changed(projector_hidden_act="relu"), "'relu'; only 'gelu'"),
    ],
)
def test_unsupported_values_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read_llava_hf_config(config)
