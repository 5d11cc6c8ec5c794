"""Written files suit safetensors' own reader, in shards of the requested size; a failure leaves no files."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from llava_core.checkpoints.headers import DTYPES, TensorInfo
from llava_core.checkpoints.tensors import read_tensors
from llava_core.checkpoints.tools.writing import (
    Planned,
    clean_generation_config,
    copy_files,
    copy_folder,
    new_folder,
    write_json,
    write_model,
)
from llava_core.errors import CheckpointError

NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
# Odd numbers of narrow values before wide ones: the order of writing must keep every tensor aligned.
TENSORS = {
    "a": torch.arange(3, dtype=torch.uint8),
    "b": torch.randn(5, 3).bfloat16(),
    "c": torch.randn(4, 2).t(),
    "d": torch.tensor(7),
    "e": torch.tensor([True, False, True]),
    "f": torch.zeros(0, 4, dtype=torch.float16),
    "g": torch.randn(3).to(torch.float8_e4m3fn),
}


def plan(tensors: dict[str, torch.Tensor]) -> list[Planned]:
    return [
        Planned(name, TensorInfo(NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)), lambda t=t: t)  # type: ignore[misc]
        for name, t in tensors.items()
    ]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.float(), right.float()) and left.shape == right.shape


def test_safetensors_reads_a_written_file(tmp_path: Path) -> None:
    write_model(tmp_path, plan(TENSORS))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(TENSORS)
    assert all(same(loaded[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize("limit", [1, 40, 70])
def test_only_a_single_tensor_may_exceed_the_shard_size(tmp_path: Path, limit: int) -> None:
    write_model(tmp_path, plan(TENSORS), max_shard_size=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {name: tmp_path / file for name, file in index["weight_map"].items()}
    loaded = read_tensors(files)
    assert all(same(loaded[name], value) for name, value in TENSORS.items())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())
    for file in set(files.values()):
        sizes = [TENSORS[name].nbytes for name in files if files[name] == file]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) == 1
    assert sorted(path.name for path in set(files.values()))[0].startswith("model-00001-of-")


def test_a_folder_appears_only_when_complete_and_is_readable(tmp_path: Path) -> None:
    with new_folder(tmp_path / "new" / "model") as folder:
        (folder / "x").write_text("")
        assert not (tmp_path / "new" / "model").exists()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model"]
    assert stat.S_IMODE(os.stat(tmp_path / "new" / "model").st_mode) == 0o755


def test_files_are_flushed_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = set()

    def flush(descriptor: int) -> None:
        assert not (tmp_path / "model").exists()
        flushed.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr("os.fsync", flush)
    with new_folder(tmp_path / "model") as folder:
        write_model(folder, plan(TENSORS))
        (folder / "tower").mkdir()
        write_json(folder / "tower" / "config.json", {})
    assert flushed == {"model.safetensors", "config.json"}


def write_while_another_creates_it(folder: Path, *files: str) -> None:
    """Simulates another process that creates the folder, with these files, before ours is complete."""
    with new_folder(folder) as new:
        (new / "ours").touch()
        folder.mkdir()
        for file in files:
            (folder / file).touch()


def test_a_folder_created_meanwhile_is_replaced_only_if_empty(tmp_path: Path) -> None:
    write_while_another_creates_it(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"full cannot be written: .*not empty"):
        write_while_another_creates_it(tmp_path / "full", "theirs")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert found == {"empty", "empty/ours", "full", "full/theirs"}


def test_a_read_error_is_not_reported_as_a_write_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    # A folder in place of a file can be opened but not read.
    (source / "tokenizer.json").mkdir(parents=True)
    wanted = pytest.raises(CheckpointError, match=r"source/tokenizer\.json cannot be read: Is a directory")
    with wanted, new_folder(tmp_path / "out") as folder:
        copy_files(source, folder, ["tokenizer.json"])

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refuse)
    wanted = pytest.raises(CheckpointError, match=r"source cannot be read: Permission denied")
    with wanted, new_folder(tmp_path / "out") as folder:
        copy_folder(source, folder / "tower")


def test_a_folder_is_copied_with_all_its_content(tmp_path: Path) -> None:
    (tmp_path / "source/deep").mkdir(parents=True)
    (tmp_path / "source/deep/a").write_bytes(bytes(range(256)))
    (tmp_path / "source/b").symlink_to("deep/a")
    copy_folder(tmp_path / "source", tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").rglob("*")} == {"a", "b", "deep"}
    assert (tmp_path / "copy/b").read_bytes() == (tmp_path / "copy/deep/a").read_bytes() == bytes(range(256))
    assert not (tmp_path / "copy/b").is_symlink()


def fail_in_the_middle(folder: Path, error: BaseException) -> None:
    with new_folder(folder) as new:
        (new / "x").write_text("")
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_a_failure_leaves_no_files(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail_in_the_middle(tmp_path / "model", error)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model cannot be written: .*No space left"):
        fail_in_the_middle(tmp_path / "model", OSError(28, "No space left on device"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "link"):
        with pytest.raises(CheckpointError, match=f"{name} exists and is not overwritten"), new_folder(tmp_path / name):
            pytest.fail("the block was entered")


def test_settings_that_transformers_would_not_save_are_removed(tmp_path: Path) -> None:
    raw = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "max_length": 4096}
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        GenerationConfig(**raw, do_sample=False).save_pretrained(tmp_path)
    cleaned = clean_generation_config(raw)
    assert cleaned == {"eos_token_id": 2, "max_length": 4096}
    GenerationConfig(**cleaned, do_sample=False).save_pretrained(tmp_path)
    assert clean_generation_config({**raw, "do_sample": True}) == {**raw, "do_sample": True}
