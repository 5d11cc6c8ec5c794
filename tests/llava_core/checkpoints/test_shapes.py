"""Expected names and shapes equal those of the modules that transformers and we build."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, MistralConfig, SiglipVisionConfig

from llava_core.checkpoints.shapes import decoder_fields, expected_shapes
from llava_core.config import ModelConfig, read_llava_hf_config
from llava_core.images.preprocess import PreprocessConfig
from llava_core.models.language import LanguageSide
from llava_core.vision.towers import build_tower

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP = CLIPVisionConfig(**TOWER, image_size=28, patch_size=14)
SIGLIP = SiglipVisionConfig(**TOWER, image_size=28, patch_size=14)


def config(text: object, tower: object = CLIP, **fields: object) -> ModelConfig:
    select = "full" if isinstance(tower, SiglipVisionConfig) else "default"
    parts = {"text_config": text.to_dict(), "vision_config": tower.to_dict()}  # type: ignore[attr-defined]
    return read_llava_hf_config({**parts, "vision_feature_select_strategy": select, **fields})


@pytest.mark.parametrize(
    "text",
    [
        LlamaConfig(**SMALL, num_key_value_heads=2),
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, head_dim=10),
        MistralConfig(**SMALL, num_key_value_heads=2),
        LlamaConfig(**SMALL, tie_word_embeddings=True),
    ],
    ids=["llama", "biases", "mistral", "tied"],
)
@pytest.mark.parametrize("tower", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_shapes_equal_the_modules(text: LlamaConfig, tower: CLIPVisionConfig, kind: str) -> None:
    model = config(text, tower, model_type=kind, image_grid_pinpoints=[[28, 56]])
    got: dict[str, dict[str, tuple[int, ...] | None]] = {"tower": {}, "projector": {}, "decoder": {}, "newline": {}}
    for key, shape in expected_shapes(model).items():
        got[key.part][key.name] = shape
    with torch.device("meta"):
        side = LanguageSide(model)
        module = build_tower(model.vision, PreprocessConfig(size=28, aspect="pad"))
    for part, expected in (("tower", module), ("projector", side.projector), ("decoder", side.decoder)):
        shapes = {name: tuple(value.shape) for name, value in expected.state_dict().items()}
        if text.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        assert got[part] == shapes, part
    assert got["newline"] == ({"image_newline": (32,)} if kind == "llava_next" else {})


@pytest.mark.parametrize(("kind", "cls"), [("llama", LlamaConfig), ("mistral", MistralConfig)])
def test_defaults_are_those_of_transformers(kind: str, cls: type[LlamaConfig]) -> None:
    theirs = cls()
    bare = read_llava_hf_config({"text_config": {"model_type": kind}, "vision_config": CLIP.to_dict()})
    fields = decoder_fields(bare)
    names = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    assert [fields[name] for name in names] == [getattr(theirs, name) for name in names]
    with torch.device("meta"):
        weight = AutoModelForCausalLM.from_config(cls(num_hidden_layers=1, vocab_size=8)).state_dict()
    assert (
        weight["model.layers.0.self_attn.k_proj.weight"].shape[0] == fields["num_key_value_heads"] * fields["head_dim"]
    )
