"""Tower digests compared with what the towers compute: equal exactly for equal features."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_tower
from llava_core.checkpoints.tower_identity import tower_digest, tower_settings
from tests.original import Kind, write_original
from tests.tiny import IMAGE_SIZE, edit_json

TILES = torch.randint(0, 256, (1, IMAGE_SIZE, IMAGE_SIZE, 3), generator=torch.Generator().manual_seed(1)).byte()


def _features(folder: Path, dtype: Any = "float32") -> Tensor:
    with torch.inference_mode():
        features: Tensor = load_tower(folder, LoadOptions(dtype=dtype))(TILES)
    return features


def _digest(folder: Path) -> str:
    return tower_digest(open_checkpoint(folder))


def _edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add_to_one_number(part: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if part in name and tensors[name].dim() == 2)
        tensors[name][0, 0] += 0.5

    return edit


@pytest.mark.parametrize("options", [{}, {"names": "saved"}, {"num_shards": 3}])
def test_the_digest_does_not_depend_on_how_weights_are_stored(
    options: dict[str, Any], tiny_checkpoint: Path, write_copy: Callable[..., Path]
) -> None:
    assert _digest(write_copy(**options)) == _digest(tiny_checkpoint)


def test_a_fine_tune_with_a_frozen_tower_keeps_the_digest(tiny_checkpoint: Path, checkpoint_copy: Path) -> None:
    for part in ("language_model", "multi_modal_projector"):
        _edit_weights(checkpoint_copy, _add_to_one_number(part))
    assert torch.equal(_features(checkpoint_copy), _features(tiny_checkpoint))
    assert _digest(checkpoint_copy) == _digest(tiny_checkpoint)


def test_a_single_changed_weight_changes_the_digest(tiny_checkpoint: Path, checkpoint_copy: Path) -> None:
    _edit_weights(checkpoint_copy, _add_to_one_number("vision_tower.vision_model.encoder.layers.0"))
    assert not torch.equal(_features(checkpoint_copy), _features(tiny_checkpoint))
    assert _digest(checkpoint_copy) != _digest(tiny_checkpoint)


def test_the_precision_in_which_equal_weights_are_stored_does_not_matter(checkpoint_copy: Path) -> None:
    _edit_weights(checkpoint_copy, lambda tensors: tensors.update({n: t.half().float() for n, t in tensors.items()}))
    digest, features = _digest(checkpoint_copy), _features(checkpoint_copy, "bfloat16")
    _edit_weights(checkpoint_copy, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    assert torch.equal(_features(checkpoint_copy, "bfloat16"), features)
    assert _digest(checkpoint_copy) == digest


@pytest.mark.parametrize(
    ("file", "change", "is_same"),
    [
        # With three layers, layer 2 is the second from the end.
        ("config.json", {"vision_feature_layer": 2}, True),
        ("config.json", {"vision_feature_layer": -1}, False),
        ("config.json", {"vision_feature_select_strategy": "full"}, False),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, False),
        ("config.json", {"vision_config": {"layer_norm_eps": 0.1}}, False),
        ("config.json", {"vision_config": {"attention_dropout": 0.5, "initializer_range": 0.5}}, True),
        ("config.json", {"vision_config": {"projection_dim": 7}}, True),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, False),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}, False),
        # These only decide which tiles a picture is split into.
        ("preprocessor_config.json", {"do_pad": False, "resample": 2}, True),
    ],
)
def test_exactly_the_settings_that_change_features_change_the_digest(
    file: str, change: dict[str, Any], tiny_checkpoint: Path, checkpoint_copy: Path, *, is_same: bool
) -> None:
    def edit(content: dict[str, Any]) -> None:
        for name, value in change.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value

    edit_json(checkpoint_copy / file, edit)
    assert torch.equal(_features(checkpoint_copy), _features(tiny_checkpoint)) == is_same
    assert (_digest(checkpoint_copy) == _digest(tiny_checkpoint)) == is_same
    settings = [tower_settings(open_checkpoint(folder)) for folder in (checkpoint_copy, tiny_checkpoint)]
    assert (settings[0] == settings[1]) == is_same


def test_a_tower_inside_a_checkpoint_has_the_digest_of_its_source(tmp_path: Path) -> None:
    folders = [write_original(tmp_path / str(inside), Kind(tower_inside=inside)).folder for inside in (True, False)]
    inside, elsewhere = map(_features, folders)
    assert torch.equal(inside, elsewhere)
    assert _digest(folders[0]) == _digest(folders[1])
