"""A `.bin` file's pickle is read for the tensors that torch would load from it; nothing in it is ever run."""

import collections
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava_core.checkpoints.headers import DTYPES
from llava_core.checkpoints.pickles import read_pickled
from llava_core.checkpoints.tensors import read_bin
from llava_core.errors import CheckpointError
from tests.payload import Payload
from tests.tiny import cut_short

KINDS = [getattr(torch, name) for name, _ in DTYPES.values()]


def save(folder: Path, content: object, *, zipped: bool) -> Path:
    torch.save(content, folder / "model.bin", _use_new_zipfile_serialization=zipped)
    return folder / "model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_dtypes_and_shapes_are_those_that_torch_loads(tmp_path: Path, *, zipped: bool) -> None:
    # torch itself cannot read the newest dtypes back from the old format.
    kinds = [kind for kind in KINDS if zipped or "float8" not in str(kind)]
    tensors = {str(kind): torch.zeros(2, 3).to(kind) for kind in kinds}
    whole = torch.arange(12.0).view(3, 4)
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4), "view": whole[1:, ::2], "turned": whole.T}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(5))
    file = save(tmp_path, tensors, zipped=zipped)
    expected = {name: (str(value.dtype)[6:], tuple(value.shape)) for name, value in read_bin(file).items()}
    assert read_pickled(file) == expected
    assert list(expected) == list(tensors)


def test_a_modules_state_is_read_without_its_version(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert isinstance(state, collections.OrderedDict)
    assert read_pickled(save(tmp_path, state, zipped=True)) == {
        "weight": ("float32", (3, 2)),
        "bias": ("float32", (3,)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, *, zipped: bool) -> None:
    file = save(tmp_path, {"a": Payload(tmp_path / "marker")}, zipped=zipped)
    with pytest.raises(CheckpointError, match=r"model\.bin holds .*could be code and are never run \(posix\.system\)"):
        read_pickled(file)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x1dOrderedDict.__init__.__self__\x93.",
        b"ctorch\nhub.load\n.",
        b"ctorch.serialization\nload\n.",
    ],
)
def test_only_names_that_tensors_need_are_looked_up(tmp_path: Path, opcodes: bytes) -> None:
    header = pickle.dumps(1) * 3
    (tmp_path / "model.bin").write_bytes(header + opcodes)
    with pytest.raises(CheckpointError, match="could be code and are never run"):
        read_pickled(tmp_path / "model.bin")


@pytest.mark.parametrize(
    "content", [{"a": 1}, {1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}, [torch.ones(1)], "text"]
)
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match=r"model\.bin must hold a dictionary of tensors"):
        read_pickled(save(tmp_path, content, zipped=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_truncated_anywhere_in_its_pickle_is_refused(tmp_path: Path, *, zipped: bool) -> None:
    file = save(tmp_path, {"a": torch.ones(2)}, zipped=zipped)
    for keep in range(300, -1, -7):
        cut_short(file, keep=keep)
        with pytest.raises(CheckpointError, match=r"model\.bin is damaged or truncated .*; download it again"):
            read_pickled(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_any_byte_changed_is_read_or_refused(tmp_path: Path, *, zipped: bool) -> None:
    file = save(tmp_path, {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.float16)}, zipped=zipped)
    content = file.read_bytes()
    for position in range(0, len(content), 7):
        for byte in (0, 0x80, 0xFF, content[position] ^ 1):
            file.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
            try:
                read_pickled(file)
            except CheckpointError as error:
                message = str(error)
                assert message.startswith(str(file))


def test_torch_is_not_imported(tmp_path: Path) -> None:
    file = save(tmp_path, {"a": torch.ones(2)}, zipped=True)
    code = (
        "import sys, pathlib; from llava_core.checkpoints.pickles import read_pickled;"
        f"print(len(read_pickled(pathlib.Path({str(file)!r}))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
