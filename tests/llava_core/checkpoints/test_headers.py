"""Headers give the dtype and shape of every tensor in both formats; damaged files are named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.checkpoints.headers import DTYPES, TensorInfo, read_header
from llava_core.checkpoints.tensors import TensorReader
from llava_core.errors import CheckpointError
from tests.tiny import cut_short

TENSORS = {
    "half": torch.zeros(3, 4, dtype=torch.float16),
    "brain": torch.zeros(5, dtype=torch.bfloat16),
    "scalar": torch.zeros((), dtype=torch.int64),
    "flags": torch.zeros(2, dtype=torch.bool),
}
EXPECTED = {
    "half": TensorInfo("F16", (3, 4)),
    "brain": TensorInfo("BF16", (5,)),
    "scalar": TensorInfo("I64", ()),
    "flags": TensorInfo("BOOL", (2,)),
}


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"model.{suffix}"
    if suffix == "bin":
        torch.save(TENSORS, file)
    else:
        save_file(TENSORS, file)
    return file


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_both_formats_have_the_same_header(tmp_path: Path, suffix: str) -> None:
    header = read_header(write(tmp_path, suffix))
    assert header == EXPECTED
    assert {name: info.num_bytes for name, info in header.items()} == {name: t.nbytes for name, t in TENSORS.items()}


def test_a_file_of_any_other_suffix_is_read_as_a_pickle(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "released.pt")
    assert read_header(tmp_path / "released.pt") == EXPECTED
    assert torch.equal(TensorReader().read(tmp_path / "released.pt", "half"), TENSORS["half"])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, suffix)
    cut_short(file, keep=60)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        read_header(file)
    with pytest.raises(CheckpointError, match="is missing"):
        read_header(tmp_path / f"other.{suffix}")


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="numbers of type complex64"):
        read_header(tmp_path / "a.bin")


@pytest.mark.parametrize(("name", "size"), DTYPES.values())
def test_item_sizes_equal_torchs(name: str, size: int) -> None:
    assert getattr(torch, name).itemsize == size
