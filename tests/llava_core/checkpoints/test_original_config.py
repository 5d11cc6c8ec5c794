"""The original code's config.json: real ones are read with all their fields; unsupported settings are named."""

import copy
from typing import Any

import pytest
from transformers import AutoConfig

from llava_core.checkpoints.original_config import (
    check_image_pooling,
    is_original_config,
    original_json,
    read_original_config,
)
from llava_core.checkpoints.towers import BIOVIL_CONFIG, KNOWN_TOWERS
from llava_core.errors import CheckpointError
from llava_core.types import Size

TOWER = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]
# From liuhaotian/llava-v1.5-7b; to transformers, its `model_type` means another layout.
LLAVA_1_5: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 1024,
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "torch_dtype": "float16",
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
LLAVA_1_6 = {
    **LLAVA_1_5,
    "model_type": "llava_mistral",
    "architectures": ["LlavaMistralForCausalLM"],
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": PINPOINTS,
    "mm_patch_merge_type": "spatial_unpad",
}


def read(**changes: Any) -> Any:
    return read_original_config({**copy.deepcopy(LLAVA_1_5), **changes}, TOWER)


def test_llava_1_5_is_read() -> None:
    config = read()
    assert (config.dialect, config.text["model_type"], config.context_length) == ("original", "llama", 4096)
    assert (config.vision.image_size, config.vision.patches_per_side, config.vision.hidden_size) == (336, 24, 1024)
    assert (config.vision.select_layer, config.vision.select_feature) == (-2, "patch")
    assert (config.projector_type, config.projector_bias, config.hidden_size) == ("mlp2x_gelu", True, 4096)
    assert (config.eos_token_ids, config.vocab_size, config.image_token_id) == ((2,), 32000, None)
    assert (config.pinpoints, config.merge_type, config.has_newline) == ((), "flat", False)
    assert config.tower_name == "openai/clip-vit-large-patch14-336"
    assert not {name for name in config.text if name.startswith("mm_")}


def test_llava_1_6_is_read_with_pinpoints_width_first() -> None:
    config = read_original_config(LLAVA_1_6, TOWER)
    assert (config.text["model_type"], config.text["rope_theta"]) == ("mistral", 1e6)
    assert config.pinpoints[0] == Size(336, 672)
    assert config.has_newline
    text = {**LLAVA_1_6, "image_grid_pinpoints": str([tuple(pair) for pair in PINPOINTS])}
    assert read_original_config(text, TOWER) == config


def test_a_null_window_disables_it_and_a_missing_field_stays_missing() -> None:
    config = read_original_config(LLAVA_1_6, TOWER)
    for text in (config.text, original_json(config, "tower", "anyres")):
        decoder: Any = AutoConfig.for_model(**{**text, "model_type": "mistral"})
        assert decoder.sliding_window is None
    silent = {name: value for name, value in LLAVA_1_6.items() if name != "sliding_window"}
    assert "sliding_window" not in read_original_config(silent, TOWER).text


def test_radialog_ignores_the_layer_fields() -> None:
    config = read_original_config({**LLAVA_1_5, "mm_vision_tower": "biovil", "mm_hidden_size": 512}, BIOVIL_CONFIG)
    assert (config.vision.image_size, config.vision.tokens_per_tile, config.vision.hidden_size) == (448, 196, 512)
    assert (config.vision.select_layer, config.vision.select_feature) == (-1, "patch")
    with pytest.raises(CheckpointError, match="s2 is set, but BioViL-T is read at one scale"):
        read_original_config({**LLAVA_1_5, "s2": True}, BIOVIL_CONFIG)


@pytest.mark.parametrize("kind", ["pool", "pool_all", "pool_concat", True])
def test_image_pooling_is_refused_by_name(kind: object) -> None:
    with pytest.raises(CheckpointError, match=f"mv_type {kind!r} needs RaDialog's image pooler"):
        check_image_pooling({"mv_type": kind})
    check_image_pooling({"mv_type": "concat"})
    check_image_pooling(LLAVA_1_5)


def test_several_scales_multiply_the_features() -> None:
    config = read(s2=True, mm_hidden_size=3072)
    assert (config.s2_scales, config.vision.hidden_size, config.tile_size) == ((336, 672, 1008), 3072, 1008)
    assert config.vision.image_size == 336


def test_without_architectures_model_type_decides_the_decoder() -> None:
    assert read(architectures=None, model_type="llava_mistral").text["model_type"] == "mistral"
    assert read(architectures=None, model_type="llava_llama").text["model_type"] == "llama"


def test_a_null_window_survives_writing_the_config() -> None:
    config = read_original_config({**LLAVA_1_6, "sliding_window": None}, TOWER)
    assert config.text["sliding_window"] is None
    assert original_json(config, "tower", "anyres")["sliding_window"] is None
    silent = {name: value for name, value in LLAVA_1_6.items() if name != "sliding_window"}
    assert "sliding_window" not in read_original_config(silent, TOWER).text


def test_pinpoints_are_used_only_with_anyres() -> None:
    assert read(image_grid_pinpoints=PINPOINTS).pinpoints == ()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAVA_1_5, True),
        ({"mm_vision_tower": None}, False),
        ({"model_type": "llama"}, False),
        ({"vision_config": {}, "text_config": {}}, False),
    ],
)
def test_a_config_that_names_a_tower_is_an_original(config: dict[str, Any], expected: bool) -> None:  # noqa: FBT001
    assert is_original_config(config) is expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "decoder 'Mpt' is not supported; known are Llama, Mistral.*use a"),
        (
            {"architectures": None, "model_type": "llava_mpt"},
            "decoder 'llava_mpt' is not supported.* use a LLaVA on Llama",
        ),
        ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler' is unknown; known are linear"),
        ({"mm_projector_type": 2}, "mm_projector_type must be text, not 2"),
        ({"mm_patch_merge_type": ["flat"]}, r"mm_patch_merge_type \['flat'\] is unknown"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature 'cls' is unknown"),
        ({"mm_vision_select_layer": [-2]}, r"mm_vision_select_layer must be a whole number .* not \[-2\]"),
        ({"mm_vision_select_layer": -30}, "mm_vision_select_layer is -30, but the tower has 24 layers"),
        ({"mm_hidden_size": 512}, "mm_hidden_size is 512, but the tower .* gives 1024"),
        ({"mm_patch_merge_type": "maxpool2x2"}, "mm_patch_merge_type 'maxpool2x2' is unknown; known are flat"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints must be a list of pairs"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[300, 672]]}, "not multiples of 336"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "import os"}, "must be a list of pairs"),
        ({"s2": True, "s2_scales": "large", "mm_hidden_size": 3072}, "s2_scales must be pixels"),
        ({"s2": True, "image_aspect_ratio": "anyres"}, "s2 and image_aspect_ratio anyres exclude one another"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number from 1"),
        (
            {
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": PINPOINTS,
                "mm_patch_merge_type": "spatial",
                "mm_vision_select_feature": "cls_patch",
            },
            "which mm_vision_select_feature cls_patch does not allow",
        ),
    ],
)
def test_unsupported_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        read(**changes)
