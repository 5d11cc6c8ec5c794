"""Weight names under our keys: unknown names are reported, computed buffers dropped, single files supported."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_core.checkpoints.keymaps import Key, from_llava_hf, from_original
from llava_core.checkpoints.weights import Weights, find_weights, first, holds, without
from llava_core.errors import CheckpointError
from tests.tiny import write_json


def test_names_map_to_keys_and_computed_buffers_are_dropped(tmp_path: Path) -> None:
    names = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.cos_cached")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert Weights(tmp_path, from_original).keys() == {"lm_head.weight": Key("decoder", "lm_head.weight")}


def test_unknown_names_are_reported(tmp_path: Path) -> None:
    save_file({"surplus": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{tmp_path} holds 1 tensors of unknown purpose: surplus"):
        Weights(tmp_path, from_original).keys()


def test_a_single_file_may_hold_all_weights(tmp_path: Path) -> None:
    file = tmp_path / "rest.pt"
    torch.save({"model.norm.weight": torch.zeros(1)}, file)
    assert Weights(tmp_path, from_original, file=file).files == {"model.norm.weight": file}


def test_the_configuration_decides_how_weights_are_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """This includes a text-only decoder."""
    assert find_weights(tiny_checkpoint).key_map is from_llava_hf
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    assert find_weights(tmp_path, frozenset({"decoder"})) == Weights(tmp_path, from_original, frozenset({"decoder"}))


def test_holds_tells_which_parts_the_weights_have(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(1), "surplus": torch.zeros(1)}, tmp_path / "model.safetensors")
    weights = (Weights(tmp_path, from_original),)
    assert holds(weights, "decoder")
    assert not holds(weights, "tower")
    assert not holds(without(weights, "decoder"), "decoder")
    assert without(weights, "decoder")[0].parts == {"tower", "projector", "newline"}


def test_long_lists_are_shortened() -> None:
    assert first(["a", "b", "c"], 2) == "a, b, ..."
    assert first([]) == "none"
