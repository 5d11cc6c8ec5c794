"""Saving: we and transformers load saved models bit for bit; nothing is overwritten or left half written."""

import os
import stat
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.describe import read_preprocess_config
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.tools import save as save_module
from llava_core.checkpoints.tools.save import config_json, save_llava_hf
from llava_core.config import read_llava_hf_config
from llava_core.errors import CheckpointError
from tests.tiny import build_tokenizer

FP32 = LoadOptions(dtype="float32")


def save(source: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_llava_hf(folder, load_tower(source, FP32), load_language_side(source, FP32), build_tokenizer(), dtype=dtype)
    return folder


def test_a_saved_model_loads_bit_for_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = save(tiny_checkpoint, tmp_path / "saved")
    for load in (load_tower, load_language_side):
        expected, got = load(tiny_checkpoint, FP32).state_dict(), load(saved, FP32).state_dict()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    check_tensors(saved)


def test_transformers_loads_a_saved_model(
    tiny_checkpoint: Path, reference_model: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    loaded = LlavaForConditionalGeneration.from_pretrained(
        save(tiny_checkpoint, tmp_path / "saved"), dtype=torch.float32
    )
    expected = reference_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_configurations_survive_saving(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = save(tiny_checkpoint, tmp_path / "saved")
    assert read_preprocess_config(saved) == read_preprocess_config(tiny_checkpoint)
    before = open_checkpoint(tiny_checkpoint).config
    assert open_checkpoint(saved).config == before
    assert read_llava_hf_config(config_json(before, dtype="float32")) == before


def test_weights_are_saved_in_the_requested_dtype(tiny_checkpoint: Path, tmp_path: Path) -> None:
    small, large = save(tiny_checkpoint, tmp_path / "small", torch.bfloat16), save(tiny_checkpoint, tmp_path / "large")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, large)]
    assert sizes[0] < 0.6 * sizes[1]
    assert open_checkpoint(small).config.dtype == "bfloat16"


def test_nothing_is_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save(tiny_checkpoint, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="choose another folder"):
        save(tiny_checkpoint, tmp_path / "saved")


def test_a_failure_leaves_no_checkpoint(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(save_module, "write_json", fail)
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        save(tiny_checkpoint, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert save(tiny_checkpoint, tmp_path / "saved").exists()


def test_saved_weights_are_readable_by_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = save(tiny_checkpoint, tmp_path / "saved") / "model.safetensors"
    assert stat.S_IMODE(os.stat(weights).st_mode) == 0o644
