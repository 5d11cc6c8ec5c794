"""A checkpoint's description without its weights: every dialect of image settings, without importing torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPImageProcessorPil, LlavaProcessor

from llava_core.checkpoints.describe import load_preparer, load_preprocess_config, read_preprocess_config
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.errors import CheckpointError
from llava_core.request_limits import RequestLimits
from llava_core.types import GenerationRequest, Message, SamplingParams, TextPart
from tests.tiny import IMAGE_SIZE, build_tokenizer, edit_json, write_json


def test_padding_settings_are_read(tiny_checkpoint: Path) -> None:
    config = read_preprocess_config(tiny_checkpoint)
    assert (config.size, config.aspect, config.pad_colour) == (IMAGE_SIZE, "pad", (122, 116, 104))


@pytest.mark.parametrize(
    ("content", "side"),
    [
        ({"crop_size": 336}, 336),
        ({"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}, 224),
        ({"size": {"height": 56, "width": 56}}, 56),
        ({"image_processor": {"crop_size": 28}}, 28),
    ],
)
def test_every_spelling_of_the_side_is_read(tmp_path: Path, content: dict[str, Any], side: int) -> None:
    write_json(tmp_path / "preprocessor_config.json", content)
    config = read_preprocess_config(tmp_path)
    assert (config.size, config.aspect) == (side, "crop")


def test_settings_saved_by_transformers_are_read(tmp_path: Path) -> None:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    LlavaProcessor(image_processor=image_processor, tokenizer=build_tokenizer(), patch_size=14).save_pretrained(
        tmp_path
    )
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert read_preprocess_config(tmp_path).size == 28


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "size is None and crop_size None"),
        ({"crop_size": "large"}, "'large'"),
        ({"crop_size": {"height": 28, "width": 56}}, "same side"),
        ({"crop_size": 224, "size": {"shortest_edge": 256}}, "same side"),
        ({"crop_size": 28, "do_normalize": False}, "do_normalize is false"),
        ({"crop_size": 28, "do_center_crop": False}, "do_center_crop is false"),
    ],
)
def test_unsupported_preprocessing_is_refused(tmp_path: Path, content: dict[str, Any], named: str) -> None:
    write_json(tmp_path / "preprocessor_config.json", content)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json: .*{named}"):
        read_preprocess_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint_copy: Path, name: str) -> None:
    (checkpoint_copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_preparer(checkpoint_copy)


def test_tiles_of_another_size_than_the_towers_name_both_files(checkpoint_copy: Path) -> None:
    sides = {"size": {"shortest_edge": 56}, "crop_size": 56}
    edit_json(checkpoint_copy / "preprocessor_config.json", lambda content: content.update(sides))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: .* 56 pixels, .*config\.json takes 28"):
        load_preprocess_config(open_checkpoint(checkpoint_copy))


def test_a_config_of_another_kind_is_refused(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config.pop("vision_config"))
    with pytest.raises(CheckpointError, match="describes no LLaVA"):
        load_preparer(checkpoint_copy)


def test_the_preparer_uses_the_checkpoints_template_and_given_limits(tiny_checkpoint: Path) -> None:
    preparer = load_preparer(tiny_checkpoint, limits=RequestLimits(max_images=3))
    assert preparer.template.name == "vicuna_v1"
    assert preparer.limits.max_images == 3
    request = GenerationRequest("r", (Message("user", (TextPart("hi"),)),), SamplingParams())
    assert preparer.prepare(request).prompt_ids[0] == 1


def test_a_given_template_takes_precedence(tiny_checkpoint: Path) -> None:
    assert load_preparer(tiny_checkpoint, template="plain").template.name == "plain"


def test_torch_is_not_imported(tiny_checkpoint: Path) -> None:
    code = (
        "import sys, pathlib; from llava_core.checkpoints.describe import load_preparer;"
        f"load_preparer(pathlib.Path({str(tiny_checkpoint)!r})); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
