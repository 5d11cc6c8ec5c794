"""Key tables: every name of a real model is covered in each spelling and maps to the hub's names and back."""

import pytest
from transformers import LlavaForConditionalGeneration

from llava_core.checkpoints.keymaps import (
    Key,
    from_biovil,
    from_llava_hf,
    from_original,
    from_tower,
    from_wrapped,
    to_llava_hf,
)
from tests.tiny import hub_name, saved_name


@pytest.fixture
def module_names(reference_model: LlavaForConditionalGeneration) -> list[str]:
    return list(reference_model.state_dict())


@pytest.mark.parametrize("spelling", [hub_name, saved_name, str])
def test_every_spelling_of_a_name_is_the_same_key(module_names: list[str], spelling: type[str]) -> None:
    assert [from_llava_hf(spelling(name)) for name in module_names] == [from_llava_hf(name) for name in module_names]


def test_keys_are_distinct_and_cover_every_part(module_names: list[str]) -> None:
    keys = [from_llava_hf(name) for name in module_names]
    assert len(set(keys)) == len(module_names)
    assert {key.part for key in keys if key} == {"tower", "projector", "decoder"}


def test_keys_map_back_to_the_hubs_names(module_names: list[str]) -> None:
    for name in module_names:
        key = from_llava_hf(name)
        assert key is not None
        assert to_llava_hf(key) == hub_name(name)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vision_tower.vision_model.embeddings.class_embedding", Key("tower", "model.embeddings.class_embedding")),
        ("multi_modal_projector.linear_2.bias", Key("projector", "2.bias")),
        ("language_model.model.layers.0.mlp.up_proj.weight", Key("decoder", "model.layers.0.mlp.up_proj.weight")),
        ("language_model.lm_head.weight", Key("decoder", "lm_head.weight")),
        ("model.language_model.norm.weight", Key("decoder", "model.norm.weight")),
        ("lm_head.weight", Key("decoder", "lm_head.weight")),
    ],
)
def test_names_of_released_checkpoints_map_to_keys(name: str, key: Key) -> None:
    assert from_llava_hf(name) == key


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.embeddings.position_ids",
        "language_model.model.layers.3.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
    ],
)
def test_computed_buffers_are_dropped(name: str) -> None:
    assert from_llava_hf(name) is None


@pytest.mark.parametrize("name", ["optimizer.step", "image_oldline", "model.mm_projector.0.weight", ""])
def test_any_other_name_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        from_llava_hf(name)


def test_a_key_without_a_foreign_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        to_llava_hf(Key("projector", "4.weight"))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.mm_projector.2.bias", Key("projector", "2.bias")),
        ("model.mm_projector.weight", Key("projector", "0.weight")),
        ("model.image_newline", Key("newline", "image_newline")),
        ("lm_head.weight", Key("decoder", "lm_head.weight")),
        ("model.layers.3.mlp.up_proj.weight", Key("decoder", "model.layers.3.mlp.up_proj.weight")),
        (
            "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
            Key("tower", "model.embeddings.class_embedding"),
        ),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", None),
        ("model.vision_tower.encoder.encoder.bn1.running_var", Key("tower", "model.trunk.bn1.running_var")),
        ("model.vision_tower.encoder.vit_pooler.pos_embed", None),
        ("model.vision_tower.projector.model.0.weight", None),
    ],
)
def test_original_names_and_their_wrapped_forms(name: str, key: Key | None) -> None:
    assert from_original(name) == key
    for prefix in ("base_model.model.", "base_model.", "module.base_model.model.", ""):
        assert from_wrapped(prefix + name) == key


def test_wrapped_llava_hf_names() -> None:
    expected = Key("decoder", "model.layers.0.mlp.up_proj.weight")
    for name in (
        "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
    ):
        assert from_wrapped(f"base_model.model.{name}") == expected


def test_names_of_the_released_biovil() -> None:
    assert from_biovil("encoder.backbone_to_vit.weight") == Key("tower", "model.narrow.weight")
    assert from_biovil("encoder.encoder.fc.bias") is None
    with pytest.raises(KeyError):
        from_biovil("classifier.weight")


def test_tower_names_and_those_of_its_text_half() -> None:
    key = Key("tower", "model.encoder.layers.0.mlp.fc1.bias")
    assert from_tower("vision_model.encoder.layers.0.mlp.fc1.bias") == key
    assert from_tower("encoder.layers.0.mlp.fc1.bias") == key
    assert from_tower("text_model.encoder.layers.0.mlp.fc1.bias") is None
    assert from_tower("logit_scale") is None
    with pytest.raises(KeyError):
        from_tower("qformer.weight")


@pytest.mark.parametrize("name", ["model.vision_resampler.weight", "transformer.wte.weight", "image_newline"])
def test_names_unknown_to_the_original_are_errors(name: str) -> None:
    with pytest.raises(KeyError):
        from_original(name)
