"""Memory estimates, compared with the real size of tensors and with the figures of known models."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from llava_core.checkpoints import memory
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.memory import (
    MemoryNeed,
    cache_bytes_per_token,
    check_fits,
    language_need,
    weight_bytes,
)
from llava_core.config import ModelConfig, read_llava_hf_config
from llava_core.errors import CheckpointError
from llava_core.models.language import LanguageSide
from tests.original import Kind, write_original
from tests.tiny import edit_json


def stored_bytes(module: nn.Module) -> int:
    """Returns the bytes of all parameters, including bitsandbytes' scales; tied parameters count once."""
    total = 0
    for parameter in {id(value): value for value in module.parameters()}.values():
        total += parameter.numel() * parameter.element_size()
        if (scales := getattr(parameter, "SCB", None)) is not None:
            total += scales.numel() * scales.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.numel() * 4
    return total


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.named_parameters()}


def llava_7b(**text: Any) -> ModelConfig:
    """Reads a configuration like that of llava-hf/llava-1.5-7b-hf, which leaves out transformers' defaults."""
    return read_llava_hf_config(
        {
            "image_token_index": 32000,
            "text_config": {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, **text},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        }
    )


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_the_estimated_bytes(dtype: Any, quantization: Any) -> None:
    options = LoadOptions(dtype=dtype, quantization=quantization)
    whole = LanguageSide(open_checkpoint(DEFAULT_MODEL).config)
    side = load_language_side(DEFAULT_MODEL, options)
    itemsize = options.torch_dtype.itemsize
    assert weight_bytes("decoder", shapes_of(whole.decoder), itemsize, quantization) == stored_bytes(side.decoder)
    assert weight_bytes("projector", shapes_of(whole.projector), itemsize, quantization) == stored_bytes(side.projector)
    tower = load_tower(DEFAULT_MODEL, options)
    assert weight_bytes("tower", shapes_of(tower), itemsize, quantization) == stored_bytes(tower)


def test_a_token_of_llava_1_5_7b_takes_half_a_mebibyte() -> None:
    assert cache_bytes_per_token(llava_7b(), 2) == 512 * 1024
    assert cache_bytes_per_token(llava_7b(model_type="mistral"), 2) == 128 * 1024
    assert cache_bytes_per_token(llava_7b(num_key_value_heads=4, head_dim=64), 2) == 2 * 32 * 4 * 64 * 2


def test_the_need_includes_cache_for_a_question_about_a_picture() -> None:
    need = language_need(llava_7b(), 14 * 2**30, 2)
    assert need.tokens == 576 + 512
    assert need.total == 14 * 2**30 + 1088 * 512 * 1024
    assert str(need) == "14.00 GiB of weights and 512 KiB of cache per token, room for 1088 tokens"


def test_a_model_that_does_not_fit_is_refused_before_reading_weights(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    monkeypatch.setattr("llava_core.checkpoints.load.read_part", lambda *_: pytest.fail("weights were read"))
    for load in (load_tower, load_language_side):
        with pytest.raises(CheckpointError, match=r"needs 0\.00 GiB on cpu .*0\.00 GiB are free; free some, choose"):
            load(tiny_checkpoint, LoadOptions(dtype="float32"))
    check_fits(MemoryNeed(1000), "cpu", "it")


def needs(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, options: LoadOptions) -> list[tuple[str, int]]:
    """Returns device and weight bytes of every memory check made while loading the language side."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "llava_core.checkpoints.load.check_fits",
        lambda need, device, _what, **_advice: asked.append((device, need.weights)),
    )
    load_language_side(checkpoint, options)
    return asked


@pytest.mark.parametrize("is_in_file", [False, True])
def test_a_head_tied_to_the_embeddings_is_counted_once(
    checkpoint_copy: Path, monkeypatch: pytest.MonkeyPatch, *, is_in_file: bool
) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    if not is_in_file:
        tensors = load_file(checkpoint_copy / "model.safetensors")
        del tensors["language_model.lm_head.weight"]
        save_file(tensors, checkpoint_copy / "model.safetensors", metadata={"format": "pt"})
    opened, options = open_checkpoint(checkpoint_copy), LoadOptions(dtype="float32")
    expected = stored_bytes(load_language_side(opened, options))
    assert needs(monkeypatch, opened, options) == [("cpu", expected)]


def test_lora_with_quantisation_needs_room_for_the_unquantised_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    opened = open_checkpoint(original.folder, original.base, offline=True)
    plain, quantised = LoadOptions(dtype="float32"), LoadOptions(dtype="float32", quantization="8bit")
    whole = stored_bytes(load_language_side(opened, plain).decoder)
    assert len(needs(monkeypatch, opened, plain)) == 1
    small = stored_bytes(load_language_side(opened, quantised))
    assert needs(monkeypatch, opened, quantised) == [("cpu", small), ("cpu", whole)]
    assert whole > small


def test_lora_that_does_not_fit_suggests_merging_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    opened = open_checkpoint(original.folder, original.base, offline=True)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**40 if device == "cuda" else 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("llava_core.checkpoints.load.read_part", lambda *_: pytest.fail("weights were read"))
    message = rf"adding the LoRA of {original.folder} to its base needs 0\.00 GiB on cpu .*with `llava merge` first"
    with pytest.raises(CheckpointError, match=message):
        load_language_side(opened, LoadOptions("cuda", dtype="float32"))
