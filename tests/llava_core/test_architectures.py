"""The tables hold every field of transformers' classes that affects the computation, with the same defaults."""

from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, PreTrainedConfig, SiglipVisionConfig
from transformers.activations import ACT2FN

from llava_core.architectures import DECODER_FIELDS, TOWER_FIELDS, read_decoder, read_tower
from llava_core.checkpoints.towers import KNOWN_TOWERS
from llava_core.errors import CheckpointError
from llava_core.fields import Fields

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "clip_vision_model": CLIPVisionConfig}
CLASSES |= {"siglip_vision_model": SiglipVisionConfig}
# Fields about how a model is run, and fields that a LLaVA has on its own level.
NOT_COMPUTED = {"model_type", "use_cache", "pretraining_tp", "tie_word_embeddings"}


def read(kind: str, **values: Any) -> Any:
    is_decoder = kind in ("llama", "mistral")
    return (read_decoder if is_decoder else read_tower)(Fields({"model_type": kind, **values}, "part."))


@pytest.mark.parametrize("kind", CLASSES)
def test_no_field_that_affects_the_computation_is_missing(kind: str) -> None:
    table = DECODER_FIELDS if kind in ("llama", "mistral") else TOWER_FIELDS
    declared = set(CLASSES[kind]().to_dict()) - set(PreTrainedConfig().to_dict())
    assert declared - NOT_COMPUTED <= set(table)


@pytest.mark.parametrize("kind", CLASSES)
def test_missing_fields_take_the_defaults_of_the_class(kind: str) -> None:
    expected = CLASSES[kind]().to_dict()
    got = CLASSES[kind](**read(kind)).to_dict()
    assert got == expected


@pytest.mark.parametrize("kind", CLASSES)
def test_everything_a_class_saves_is_read_back(kind: str) -> None:
    config = CLASSES[kind](hidden_size=64, num_attention_heads=8, intermediate_size=7, hidden_act="relu")
    once = read(kind, **config.to_dict())
    assert read(kind, **once) == once
    assert CLASSES[kind](**once).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", sorted(KNOWN_TOWERS))
def test_known_towers_are_read_unchanged(name: str) -> None:
    assert read_tower(Fields(KNOWN_TOWERS[name])) == KNOWN_TOWERS[name]


def test_null_differs_from_a_missing_field_where_it_has_a_meaning() -> None:
    assert "sliding_window" not in read("mistral")
    assert read("mistral", sliding_window=None)["sliding_window"] is None
    assert read("mistral")["num_key_value_heads"] == 8
    assert read("mistral", num_key_value_heads=None)["num_key_value_heads"] == 32
    with pytest.raises(CheckpointError, match=r"part\.hidden_size must be a whole number .*, not None"):
        read("llama", hidden_size=None)


@pytest.mark.parametrize("name", ["gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"])
def test_every_known_activation_exists_in_transformers(name: str) -> None:
    assert read("llama", hidden_act=name)["hidden_act"] == name
    assert name in ACT2FN


ROPES: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        }
    },
]


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rope_scaling_is_kept(rope: dict[str, Any]) -> None:
    for name, value in rope.items():
        assert read("llama", **rope)[name] == value


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        ("llama", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 4096"),
        ("mistral", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 4096"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 32"),
        ("llama", {"head_dim": 5}, "have 5 numbers each"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number from 1 to 1000"),
        ("llama", {"pad_token_id": 32000}, "pad_token_id is 32000, but vocab_size is 32000"),
        ("llama", {"hidden_act": "swash"}, "hidden_act 'swash' is unknown; known are gelu"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor must be a number above 0, not None"),
        ("llama", {"rope_scaling": {"type": "su"}}, r"rope_scaling\.type 'su' is unknown; known are default, linear"),
        ("llama", {"rope_parameters": "linear"}, "rope_parameters must be an object"),
        ("clip_vision_model", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide hidden_size 768"),
        ("clip_vision_model", {"num_channels": 4}, "num_channels must be 3, not 4"),
        ("siglip_vision_model", {"patch_size": 225}, "image_size 224 is smaller than patch_size 225"),
        ("siglip_vision_model", {"image_size": 10**400}, "image_size must be a whole number"),
    ],
)
def test_unbuildable_configurations_name_the_field(kind: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^part\..*{named}"):
        read(kind, **values)
