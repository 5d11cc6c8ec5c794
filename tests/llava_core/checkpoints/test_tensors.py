"""Reading weight files: tensors are read exactly as written, and nothing but tensors is ever read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.checkpoints.tensors import read_bin, read_tensors
from llava_core.errors import CheckpointError
from tests.payload import Payload
from tests.tiny import cut_short

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "old.bin"])
def test_every_format_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if file.suffix == ".safetensors":
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=name != "old.bin")
    loaded = read_tensors(dict.fromkeys(TENSORS, file))
    assert set(loaded) == set(TENSORS)
    assert all(torch.equal(loaded[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:  # noqa: FBT001
    file, marker = tmp_path / "evil.bin", tmp_path / "marker"
    torch.save({"a": Payload(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.bin .*could be code and are never run"):
        read_bin(file)
    assert not marker.exists()


@pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(1)], "text"])
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "odd.bin")
    with pytest.raises(CheckpointError, match=r"odd\.bin must hold a dictionary of tensors"):
        read_bin(tmp_path / "odd.bin")


@pytest.mark.parametrize("keep", [0, 1, 100, 300])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int, zipped: bool) -> None:  # noqa: FBT001
    torch.save(TENSORS, tmp_path / "cut.bin", _use_new_zipfile_serialization=zipped)
    cut_short(tmp_path / "cut.bin", keep=keep)
    with pytest.raises(CheckpointError, match=r"cut\.bin is damaged"):
        read_bin(tmp_path / "cut.bin")


@pytest.mark.parametrize("name", ["none.bin", "none.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_tensors({"a": tmp_path / name})


def test_a_tensor_missing_from_the_file_is_named(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="does not hold c"):
        read_tensors({"c": tmp_path / "model.bin"})
