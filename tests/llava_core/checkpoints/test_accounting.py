"""Completeness by names alone: a whole checkpoint passes in each layout, and every hole is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_core.checkpoints.accounting import check_tensors
from llava_core.errors import CheckpointError
from tests.tiny import cut_short, edit_json, write_weights


@pytest.mark.parametrize("names", ["hub", "saved", "module"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_whole_checkpoint_passes(write_copy: Callable[..., Path], names: str, num_shards: int) -> None:
    check_tensors(write_copy(names=names, num_shards=num_shards))


def test_every_single_missing_tensor_is_noticed_and_named(checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    for name in sorted(tensors):
        write_weights(checkpoint_copy, {other: value for other, value in tensors.items() if other != name})
        with pytest.raises(CheckpointError) as caught:
            check_tensors(checkpoint_copy)
        assert name.split(".")[-1] in str(caught.value)
        assert str(checkpoint_copy) in str(caught.value)


def test_a_missing_layer_is_named(checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "language_model.model.layers.1." not in name}
    write_weights(checkpoint_copy, kept)
    with pytest.raises(CheckpointError, match="2 decoder layers, the files hold 1; missing are: layer 1"):
        check_tensors(checkpoint_copy)


def test_more_layers_than_the_config_says_are_refused(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="1 decoder layers, the files hold 2"):
        check_tensors(checkpoint_copy)


def test_an_unknown_tensor_is_named(checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    write_weights(checkpoint_copy, {**tensors, "surplus": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="1 tensors of unknown purpose: surplus"):
        check_tensors(checkpoint_copy)


def test_tied_embeddings_need_no_head(checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    write_weights(checkpoint_copy, {name: value for name, value in tensors.items() if "lm_head" not in name})
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    check_tensors(checkpoint_copy)


def test_a_truncated_file_is_named(checkpoint_copy: Path) -> None:
    cut_short(checkpoint_copy / "model.safetensors", keep=2_000)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        check_tensors(checkpoint_copy)
