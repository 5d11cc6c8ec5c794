"""Finding the file of each tensor, and one clear message for every way a folder can be damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_core.checkpoints.files import find_tensors, read_json, tensor_names
from llava_core.errors import CheckpointError
from tests.tiny import cut_short, edit_json


def test_a_single_file_and_shards_hold_the_same_tensors(tiny_checkpoint: Path, write_copy: Callable[..., Path]) -> None:
    sharded = write_copy(num_shards=3)
    assert set(find_tensors(sharded)) == set(find_tensors(tiny_checkpoint))
    assert len(set(find_tensors(sharded).values())) == 3
    assert {file.name for file in find_tensors(tiny_checkpoint).values()} == {"model.safetensors"}


def test_a_folder_without_weights_is_refused(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model.safetensors and no model.safetensors.index.json"):
        find_tensors(checkpoint_copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 10_000])
def test_a_truncated_file_is_named(checkpoint_copy: Path, keep: int) -> None:
    cut_short(checkpoint_copy / "model.safetensors", keep=keep)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or truncated .*download it again"):
        find_tensors(checkpoint_copy)


def test_a_missing_shard_is_named(write_copy: Callable[..., Path]) -> None:
    sharded = write_copy(num_shards=3)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
        find_tensors(sharded)


@pytest.mark.parametrize("change", ["drop", "add", "move"])
def test_an_index_that_disagrees_with_its_shards_names_a_tensor(write_copy: Callable[..., Path], change: str) -> None:
    sharded = write_copy(num_shards=2)
    name = "multi_modal_projector.linear_1.weight"

    def edit(index: dict[str, dict[str, str]]) -> None:
        files = sorted(set(index["weight_map"].values()))
        if change == "drop":
            del index["weight_map"][name]
        elif change == "add":
            index["weight_map"]["multi_modal_projector.extra"] = files[0]
        else:
            index["weight_map"][name] = files[1 - files.index(index["weight_map"][name])]

    edit_json(sharded / "model.safetensors.index.json", edit)
    wrong = "multi_modal_projector.extra" if change == "add" else name
    with pytest.raises(CheckpointError, match=f"disagree, for example about {wrong}"):
        find_tensors(sharded)


@pytest.mark.parametrize("content", ['{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}", "[]", "{", ""])
def test_a_damaged_index_is_named(write_copy: Callable[..., Path], content: str) -> None:
    sharded = write_copy(num_shards=2)
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        find_tensors(sharded)


def test_an_index_cannot_reach_outside_its_folder(write_copy: Callable[..., Path]) -> None:
    sharded = write_copy(num_shards=2)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        find_tensors(sharded)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        tensor_names(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "named"), [(b"{", "cannot be read as JSON"), (b"\xff\xfe", "cannot be read"), (b"[1]", "not list")]
)
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config.json .*{named}"):
        read_json(tmp_path, "config.json")


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        read_json(tmp_path, "config.json")
