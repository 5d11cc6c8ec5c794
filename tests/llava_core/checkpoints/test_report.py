"""What `llava inspect` tells is what loading finds, in every layout; and everything that is wrong is told at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.report import as_text, inspect_checkpoint
from llava_core.types import Size
from tests.original import Kind, write_json, write_original
from tests.tiny import cut_short, edit_json

KINDS = {
    "original": (Kind(num_shards=2), "original"),
    "bin": (Kind(files="bin", num_shards=2), "original"),
    "own tower": (Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True), "original"),
    "projector": (Kind(layout="projector", projector="linear"), "original projector"),
    "LoRA": (Kind(layout="lora", decoder="mistral"), "original LoRA"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_report_is_what_loading_finds(tmp_path: Path, name: str) -> None:
    kind, layout = KINDS[name]
    original = write_original(tmp_path, kind)
    base = str(original.base) if original.base else None
    report = inspect_checkpoint(str(original.folder), base, offline=True, sizes=[Size(45, 30)])
    assert report["problems"] == []
    assert (report["layout"], report["base"]) == (layout, base)
    checkpoint = open_checkpoint(original.folder, base, offline=True)
    options = LoadOptions(dtype="float32")
    side, tower = load_language_side(checkpoint, options), load_tower(checkpoint, options)
    loaded = {"tower": tower, "projector": side.projector, "decoder": side.decoder}
    for part, module in loaded.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        assert report["parts"][part]["parameters"] == report["num_parameters"][part] == count
    assert report["parts"]["decoder"]["dtypes"] == ["F32"]
    assert report["decoder"]["architecture"] == kind.decoder
    assert report["projector"]["type"] == kind.projector
    assert report["image_tokens"]["45x30"] == (4 + 2 * 5 if kind.merge == "spatial_unpad" else 4)
    config = side.decoder.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert report["kv_cache_bytes_per_token"]["float16"] == 2 * numbers
    assert report["tower_folder"] == (None if kind.tower_inside else str(original.folder.parent / "tower"))
    assert (report["adapter"] is not None) == (kind.layout == "lora")


def test_templates_and_why_there_is_none(tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert inspect_checkpoint(str(tiny_checkpoint))["prompt"]["template"] == "vicuna_v1"
    linear = write_original(tmp_path, Kind(projector="linear"))
    report = inspect_checkpoint(str(linear.folder))
    assert report["problems"] == []
    assert report["prompt"]["template"] is None
    assert "--template" in report["prompt"]["why"]
    assert inspect_checkpoint(str(linear.folder), template="v0")["prompt"]["template"] == "v0"


def test_every_fault_is_told_and_the_rest_as_well(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    file = original.folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.mm_projector.2.bias"] = torch.zeros(5)
    tensors |= {"model.vision_resampler.x": torch.zeros(1)}
    save_file(tensors, file)
    (original.folder / "tokenizer.json").unlink()
    report = inspect_checkpoint(str(original.folder))
    problems = "\n".join(report["problems"])
    for named in (
        "decoder model.norm.weight is missing",
        "decoder model.layers.1.mlp.up_proj.weight is missing",
        "projector 2.bias has shape (5,)",
        "1 tensors of unknown purpose: model.vision_resampler.x",
        "neither tokenizer.model nor tokenizer.json",
    ):
        assert named in problems
    assert report["decoder"]["num_hidden_layers"] == 2
    assert report["prompt"]["template"] is None
    assert f"problems: {len(report['problems'])}\n  - " in as_text(report)


def test_what_cannot_be_opened_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    edit_json(original.folder / "config.json", lambda config: config.update(mm_vision_tower="nowhere"))
    report = inspect_checkpoint(str(original.folder), offline=True)
    assert report["layout"] == "original"
    assert report["parts"]["decoder"]["tensors"] == 21
    assert "mm_vision_tower 'nowhere' is unknown" in report["problems"][0]
    cut_short(original.folder / "model.safetensors", keep=100)
    assert any("damaged or truncated" in problem for problem in inspect_checkpoint(str(original.folder))["problems"])
    (original.folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in inspect_checkpoint(str(original.folder))["problems"][0]


def test_an_adapter_over_the_wrong_base_names_every_weight(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    assert original.base is not None
    tensors = load_file(original.base / "model.safetensors")
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    save_file({**tensors, **{name: torch.zeros(32, 8) for name in names}}, original.base / "model.safetensors")
    problems = "\n".join(inspect_checkpoint(str(original.folder), str(original.base))["problems"])
    assert all(f"{name} of shape (32, 48), where the base has (32, 8)" in problems for name in names)


def test_a_delta_is_told_by_its_field(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"mm_vision_tower": "x", "delta_base": "some/base"})
    report = inspect_checkpoint(str(tmp_path))
    assert (report["layout"], report["base"]) == ("delta", "some/base")
    assert "llava delta apply" in report["problems"][0]


def test_fewer_bits_take_fewer_bytes() -> None:
    report = inspect_checkpoint(str(DEFAULT_MODEL))
    weights, cache = report["weight_bytes"], report["kv_cache_bytes_per_token"]
    assert weights["float32"] == 4 * report["num_parameters"]["total"] == 2 * weights["bfloat16"]
    assert weights["4bit"] < weights["8bit"] < weights["float16"] == weights["bfloat16"]
    assert cache["8bit"] == cache["bfloat16"] == cache["float32"] / 2 == 2 * 5 * 192 * 2


def test_a_look_at_safetensors_needs_no_torch() -> None:
    script = (
        "import sys; from llava_core.checkpoints.report import inspect_checkpoint\n"
        f"assert inspect_checkpoint({str(DEFAULT_MODEL)!r})['problems'] == []\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110)
    assert done.stdout == "False\n", done.stderr
