"""`llava inspect` reports what loading finds, in every layout; all problems are reported together."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_core.checkpoints.describe import load_preparer
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.tools.report import as_text, inspect_checkpoint
from llava_core.errors import PromptTooLongError, UnknownNameError
from llava_core.prepare import Preparer
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, Size
from tests.original import TOWER_CONFIG, Kind, write_json, write_original
from tests.tiny import cut_short, edit_json

KINDS = {
    "original": (Kind(num_shards=2), "original"),
    "bin": (Kind(files="bin", num_shards=2), "original"),
    "own tower": (Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True), "original"),
    "projector": (Kind(layout="projector", projector="linear"), "original projector"),
    "LoRA": (Kind(layout="lora", decoder="mistral"), "original LoRA"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_report_matches_what_loading_finds(tmp_path: Path, name: str) -> None:
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


def test_the_report_gives_the_template_or_why_there_is_none(tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert inspect_checkpoint(str(tiny_checkpoint))["prompt"]["template"] == "vicuna_v1"
    linear = write_original(tmp_path, Kind(projector="linear"))
    report = inspect_checkpoint(str(linear.folder))
    assert report["problems"] == []
    assert report["prompt"]["template"] is None
    assert "--template" in report["prompt"]["why"]
    assert inspect_checkpoint(str(linear.folder), template="v0")["prompt"]["template"] == "v0"


def test_every_problem_is_reported_along_with_the_rest(tmp_path: Path) -> None:
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


def test_an_unopenable_checkpoint_is_described_as_far_as_possible(tmp_path: Path) -> None:
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
    assert all(f"{name} of shape (32, 48), but the base has (32, 8)" in problems for name in names)


def test_a_delta_is_recognised_by_its_field(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"mm_vision_tower": "x", "delta_base": "some/base"})
    report = inspect_checkpoint(str(tmp_path))
    assert (report["layout"], report["base"]) == ("delta", "some/base")
    assert "llava delta apply" in report["problems"][0]


def test_a_folder_that_is_no_llava_is_reported_as_such(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="projector"))
    report = inspect_checkpoint(str(original.base))
    assert (report["layout"], len(report["problems"])) == ("text-only", 1)
    assert "describes no LLaVA, but perhaps a text-only model" in report["problems"][0]
    assert report["parts"]["decoder"]["tensors"] == 21
    assert inspect_checkpoint(str(tmp_path / "tower"))["layout"] == "unknown"


def test_quantisation_reduces_the_reported_bytes() -> None:
    report = inspect_checkpoint(str(DEFAULT_MODEL))
    weights, cache = report["weight_bytes"], report["kv_cache_bytes_per_token"]
    assert weights["float32"] == 4 * report["num_parameters"]["total"] == 2 * weights["bfloat16"]
    assert weights["4bit"] < weights["8bit"] < weights["float16"] == weights["bfloat16"]
    assert cache["8bit"] == cache["bfloat16"] == cache["float32"] / 2 == 2 * 5 * 192 * 2


def test_inspecting_safetensors_does_not_import_torch() -> None:
    script = (
        "import sys; from llava_core.checkpoints.tools.report import inspect_checkpoint\n"
        f"assert inspect_checkpoint({str(DEFAULT_MODEL)!r})['problems'] == []\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110)
    assert done.stdout == "False\n", done.stderr


def test_a_refused_picture_size_is_a_problem_only_if_asked_for(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(aspect="anyres"))
    around = load_preparer(open_checkpoint(original.folder)).prepare(one_picture(Size(28, 28)))
    # One tile and an overview of 4 tokens each leave one token for the answer.
    fields = {
        "image_grid_pinpoints": [[28, 28], [56, 28]],
        "max_position_embeddings": len(around.prompt_ids) - around.num_image_tokens[0] + 8 + 1,
    }
    edit_json(original.folder / "config.json", lambda config: config.update(fields))
    report = inspect_checkpoint(str(original.folder))
    assert report["image_tokens"] == {"336x336": 8, "640x480": 12, "1920x1080": 12}
    assert list(report["refused_sizes"]) == ["640x480", "1920x1080"]
    assert report["problems"] == []
    assert "\n  640x480: the prompt has" in as_text(report)
    asked = inspect_checkpoint(str(original.folder), sizes=[Size(28, 28), Size(56, 28), Size(20_000, 28)])["problems"]
    assert [problem.partition(":")[0] for problem in asked] == [
        "a picture of 56x28 is refused",
        "a picture of 20000x28 is refused",
    ]
    assert "40000000 pixels and 10000 per side" in asked[1]


def test_refused_sizes_are_those_that_preparing_refuses(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(aspect="anyres", merge="spatial_unpad"))
    preparer = load_preparer(open_checkpoint(original.folder))
    sizes = [Size(28, 28), Size(28, 84), Size(90, 28), Size(640, 480)]
    for context in range(225, 245):
        edit_json(original.folder / "config.json", lambda config, to=context: config.update(max_position_embeddings=to))
        report = inspect_checkpoint(str(original.folder), sizes=sizes)
        shorter = replace(preparer, config=replace(preparer.config, context_length=context))
        refused = [f"{size.width}x{size.height}" for size in sizes if not is_prepared(shorter, size)]
        assert list(report["refused_sizes"]) == refused


def one_picture(size: Size) -> GenerationRequest:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return GenerationRequest("r", (Message("user", (ImagePart(buffer.getvalue()),)),), SamplingParams())


def is_prepared(preparer: Preparer, size: Size) -> bool:
    try:
        preparer.prepare(one_picture(size))
    except PromptTooLongError:
        return False
    return True


def test_a_model_without_room_for_any_picture_has_problems(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(max_position_embeddings=100))
    problems = inspect_checkpoint(str(checkpoint_copy))["problems"]
    assert [problem.partition(" is refused: ")[0] for problem in problems] == [
        "a picture of 336x336",
        "a picture of 640x480",
        "a picture of 1920x1080",
    ]


def test_an_unknown_template_is_an_error(tiny_checkpoint: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown template 'nonsense'; known are: .*vicuna_v1"):
        inspect_checkpoint(str(tiny_checkpoint), template="nonsense")


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"eos_token_id": 10_000}, r"config\.json: eos_token_id is 10000, but vocab_size is"),
        ("generation_config.json", {"eos_token_id": [2, 10_000]}, r"generation_config\.json: eos_token_id is 10000"),
        ("../tower/config.json", {"num_attention_heads": 3}, r"tower/config\.json: num_attention_heads 3 does not di"),
        ("config.json", {"num_attention_heads": 5}, r"config\.json: num_attention_heads 5 does not divide"),
    ],
)
def test_faults_that_no_shape_reveals_are_reported_too(
    tmp_path: Path, file: str, changes: dict[str, object], named: str
) -> None:
    original = write_original(tmp_path, Kind())
    write_json(tmp_path / "tower" / "config.json", TOWER_CONFIG)
    path = original.folder / file
    write_json(path, {**(json.loads(path.read_text()) if path.exists() else {}), **changes})
    problems = inspect_checkpoint(str(original.folder))["problems"]
    assert any(re.search(named, problem) for problem in problems)
