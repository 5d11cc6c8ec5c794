"""A faulty safetensors file gives the same message whether names, headers or tensors are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.checkpoints import safetensors_file
from llava_core.checkpoints.files import tensor_names
from llava_core.checkpoints.headers import read_header
from llava_core.checkpoints.safetensors_file import open_safetensors
from llava_core.checkpoints.tensors import read_tensors
from llava_core.errors import CheckpointError
from tests.tiny import cut_short

READERS: list[Callable[[Path], object]] = [tensor_names, read_header, lambda file: read_tensors({"a": file})]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_names_and_tensors_are_read(file: Path) -> None:
    with open_safetensors(file, "pt") as opened:
        assert list(opened.keys()) == ["a"]
        assert torch.equal(opened.get_tensor("a"), torch.arange(3))


def message(read: Callable[[Path], object], file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(file)
    return str(caught.value)


def test_every_reader_gives_the_same_message(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(file, keep=20)
    assert len({message(read, file) for read in READERS}) == 1
    assert "x.safetensors is damaged or truncated" in message(tensor_names, file)
    absent = file.parent / "y.safetensors"
    assert all("is missing; the checkpoint is incomplete" in message(read, absent) for read in READERS)

    def refuse(path: Path, _: str) -> None:
        # The library's reaction to missing permissions, which a test that runs as root cannot revoke.
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(safetensors_file, "safe_open", refuse)
    assert all("x.safetensors cannot be read: permission denied" in message(read, file) for read in READERS)


def test_a_missing_tensor_is_reported_as_damage(file: Path) -> None:
    assert "x.safetensors is damaged or truncated" in message(lambda path: read_tensors({"b": path}), file)
