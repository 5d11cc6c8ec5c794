"""The table of contents: every tensor by our key with its file; of two weights for a key, the later one counts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_core.checkpoints.contents import stored_tensors
from llava_core.checkpoints.headers import TensorInfo
from llava_core.checkpoints.keymaps import Key
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.errors import CheckpointError
from tests.original import HIDDEN, Kind, write_original
from tests.tiny import edit_json


def test_every_tensor_is_listed_with_its_file_and_shape(tiny_checkpoint: Path) -> None:
    stored = stored_tensors(open_checkpoint(tiny_checkpoint).weights)
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    assert {each.name: each.info.shape for each in stored.values()} == {n: tuple(t.shape) for n, t in tensors.items()}


def test_trained_weights_replace_those_of_the_base(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="projector"))
    stored = stored_tensors(open_checkpoint(original.folder, original.base).weights)
    projector = stored[Key("projector", "2.bias")]
    assert (projector.file.name, projector.info, projector.is_rounded) == (
        "mm_projector.bin",
        TensorInfo("F32", (HIDDEN,)),
        True,
    )
    assert stored[Key("decoder", "lm_head.weight")].file.parent == original.base
    assert stored[Key("tower", "model.embeddings.class_embedding")].file.parent.name == "tower"


def test_an_index_entry_missing_from_its_file_is_an_error(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(files="bin", num_shards=2))
    index = original.folder / "pytorch_model.bin.index.json"
    edit_json(
        index,
        lambda c: c["weight_map"].update({"model.layers.9.mlp.up_proj.weight": next(iter(c["weight_map"].values()))}),
    )
    with pytest.raises(CheckpointError, match=r"does not hold model\.layers\.9\.mlp"):
        stored_tensors(open_checkpoint(original.folder).weights)


def test_code_in_a_bin_file_is_not_run(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(files="bin"))
    torch.save({"lm_head.weight": Trap()}, original.folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="never run"):
        stored_tensors(open_checkpoint(original.folder).weights)


class Trap:
    """Calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("code in a checkpoint was run",)
