"""What a model needs, against what its tensors really take, and against known models' figures."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from llava_core.checkpoints import memory
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.memory import (
    MemoryNeed,
    available_bytes,
    cache_bytes_per_token,
    check_fits,
    language_need,
    weight_bytes,
)
from llava_core.config import ModelConfig, read_llava_hf_config
from llava_core.errors import CheckpointError
from llava_core.models.language import LanguageSide


def stored_bytes(module: nn.Module) -> int:
    """All that its parameters hold, bitsandbytes' scales included; tied ones once."""
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
    """As the configurations of llava-hf/llava-1.5-7b-hf say it: what is transformers' default is left out."""
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
def test_weights_take_what_was_reckoned(dtype: Any, quantization: Any) -> None:
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


def test_there_must_be_room_for_a_question_about_a_picture() -> None:
    need = language_need(llava_7b(), 14 * 2**30, 2)
    assert need.tokens == 576 + 512
    assert need.total == 14 * 2**30 + 1088 * 512 * 1024
    assert str(need) == "14.00 GiB of weights and 512 KiB of cache per token"


def test_what_does_not_fit_is_refused_before_a_weight_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    monkeypatch.setattr("llava_core.checkpoints.load.read_part", lambda *_: pytest.fail("weights were read"))
    for load in (load_tower, load_language_side):
        with pytest.raises(CheckpointError, match=r"needs 0\.00 GiB on cpu .*0\.00 GiB are free; free some, choose"):
            load(tiny_checkpoint, LoadOptions(dtype="float32"))
    check_fits(MemoryNeed(1000), "cpu", "it")


def test_the_machine_has_no_more_than_it_has() -> None:
    assert 0 < available_bytes("cpu") <= psutil.virtual_memory().total


def test_a_container_has_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    for name, text in (("memory.max", "1000000"), ("memory.current", "700000"), ("memory.stat", "anon 1\nfile 200000")):
        (tmp_path / name).write_text(text + os.linesep)
    assert available_bytes("cpu") == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes("cpu") > 500000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_is_free() -> None:
    assert 0 < available_bytes("cuda") <= torch.cuda.mem_get_info("cuda")[1]
