"""Names of weights under our keys: what no row covers is named, what is computed is dropped, one file may be all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.checkpoints.keymaps import Key, from_llava_hf, from_original
from llava_core.checkpoints.weights import Weights, find_weights, first, holds, without
from llava_core.errors import CheckpointError
from tests.tiny import write_json


def test_names_are_ours_and_computed_buffers_are_dropped(tmp_path: Path) -> None:
    names = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.cos_cached")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert Weights(tmp_path, from_original).keys() == {"lm_head.weight": Key("decoder", "lm_head.weight")}


def test_names_that_no_row_covers_are_named(tmp_path: Path) -> None:
    save_file({"surplus": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds 1 tensors of unknown purpose: surplus"):
        Weights(tmp_path, from_original).keys()


def test_one_file_may_be_all_there_is(tmp_path: Path) -> None:
    file = tmp_path / "rest.pt"
    torch.save({"model.norm.weight": torch.zeros(1)}, file)
    assert Weights(tmp_path, from_original, file=file).files == {"model.norm.weight": file}


def test_a_folders_own_weights_are_read_as_its_configuration_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A text-only decoder among them."""
    assert find_weights(tiny_checkpoint).key_map is from_llava_hf
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    assert find_weights(tmp_path, frozenset({"decoder"})) == Weights(tmp_path, from_original, frozenset({"decoder"}))


def test_a_part_is_held_where_it_is_taken_from(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(1), "surplus": torch.zeros(1)}, tmp_path / "model.safetensors")
    weights = (Weights(tmp_path, from_original),)
    assert holds(weights, "decoder")
    assert not holds(weights, "tower")
    assert not holds(without(weights, "decoder"), "decoder")
    assert without(weights, "decoder")[0].parts == {"tower", "projector", "newline"}


def test_long_lists_are_cut_short() -> None:
    assert first(["a", "b", "c"], 2) == "a, b, ..."
    assert first([]) == "none"
