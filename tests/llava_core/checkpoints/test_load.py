"""Loading by part: every naming and sharding gives the same weights, and every key is accounted for."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.errors import CheckpointError
from tests.tiny import cut_short, edit_json, write_weights

FP32 = LoadOptions(dtype="float32")
ORIGINAL_RESET = torch.nn.Linear.reset_parameters


def loaded_weights(folder: Path, options: LoadOptions = FP32) -> dict[str, torch.Tensor]:
    """Loads all three parts; returns their weights under the names of transformers' module."""
    tower, language = load_tower(folder, options), load_language_side(folder, options)
    projector = {
        name.replace("0.", "linear_1.").replace("2.", "linear_2."): value
        for name, value in language.projector.state_dict().items()
    }
    decoder = {
        name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}": value
        for name, value in language.decoder.state_dict().items()
    }
    return {
        **{f"model.vision_tower.{name}": value for name, value in tower.model.state_dict().items()},
        **{f"model.multi_modal_projector.{name}": value for name, value in projector.items()},
        **decoder,
    }


def digest(weights: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


@pytest.mark.parametrize("names", ["hub", "saved", "module"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_layout_loads_bit_for_bit(
    reference_model: LlavaForConditionalGeneration, write_copy: Callable[..., Path], names: str, num_shards: int
) -> None:
    loaded = loaded_weights(write_copy(names=names, num_shards=num_shards))
    expected = reference_model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_checkpoint_saved_by_transformers_loads(
    reference_model: LlavaForConditionalGeneration, checkpoint_copy: Path
) -> None:
    (checkpoint_copy / "model.safetensors").unlink()
    reference_model.save_pretrained(checkpoint_copy)
    loaded = loaded_weights(checkpoint_copy)
    assert all(torch.equal(loaded[name], value) for name, value in reference_model.state_dict().items())


def test_loading_twice_gives_the_same_bits(tiny_checkpoint: Path) -> None:
    assert digest(loaded_weights(tiny_checkpoint)) == digest(loaded_weights(tiny_checkpoint))


def test_loading_patches_nothing(tiny_checkpoint: Path) -> None:
    loaded_weights(tiny_checkpoint)
    assert torch.nn.Linear.reset_parameters is ORIGINAL_RESET
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_has_the_requested_dtype_and_is_not_meta(tiny_checkpoint: Path, dtype: Any) -> None:
    options = LoadOptions(dtype=dtype)
    for part in (load_tower(tiny_checkpoint, options), load_language_side(tiny_checkpoint, options)):
        assert not part.training
        for name, value in part.named_parameters():
            assert (value.dtype, value.device.type) == (options.torch_dtype, "cpu"), name
        assert not any(buffer.is_meta for buffer in part.buffers())


def test_auto_dtype_is_a_known_dtype_and_others_are_refused() -> None:
    assert LoadOptions().torch_dtype in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="'int8'"):
        LoadOptions(dtype="int8")  # type: ignore[arg-type]


KEYS = {
    "tower": "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
    "projector": "multi_modal_projector.linear_2.bias",
    "decoder": "language_model.model.layers.0.self_attn.q_proj.weight",
}


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Loads the weights of a checkpoint's single file, lets `edit` change them, and writes them back."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write_weights(folder, tensors)
    return folder


def load_part(folder: Path, part: str) -> object:
    return load_tower(folder, FP32) if part == "tower" else load_language_side(folder, FP32)


@pytest.mark.parametrize("part", KEYS)
def test_a_dropped_key_is_named(checkpoint_copy: Path, part: str) -> None:
    rewrite(checkpoint_copy, lambda tensors: tensors.pop(KEYS[part]))
    shown = KEYS[part].split(".", 2)[-1].removeprefix("linear_").replace("linear_", "")
    with pytest.raises(CheckpointError, match=f"{part} does not match config.json; missing 1 .*{shown}"):
        load_part(checkpoint_copy, part)


@pytest.mark.parametrize("part", KEYS)
def test_an_added_key_of_a_part_is_named(checkpoint_copy: Path, part: str) -> None:
    extra = KEYS[part].rsplit(".", 1)[0] + ".scale"
    rewrite(checkpoint_copy, lambda tensors: tensors.update({extra: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected 1 .*\.scale"):
        load_part(checkpoint_copy, part)


@pytest.mark.parametrize("part", ["tower", "decoder"])
def test_an_unknown_key_fails_every_part(checkpoint_copy: Path, part: str) -> None:
    rewrite(checkpoint_copy, lambda tensors: tensors.update({"surplus": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="1 tensors of unknown purpose: surplus"):
        load_part(checkpoint_copy, part)


def test_computed_buffers_of_old_versions_are_dropped(checkpoint_copy: Path) -> None:
    before = digest(loaded_weights(checkpoint_copy))
    old = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    rewrite(checkpoint_copy, lambda tensors: tensors.update(old))
    assert digest(loaded_weights(checkpoint_copy)) == before


@pytest.mark.parametrize("part", KEYS)
def test_a_wrong_shape_is_named_with_both_shapes(checkpoint_copy: Path, part: str) -> None:
    rewrite(checkpoint_copy, lambda tensors: tensors.update({KEYS[part]: torch.zeros(3, 1)}))
    with pytest.raises(CheckpointError, match=rf"{part} tensor .* has shape \(3, 1\), config.json says \("):
        load_part(checkpoint_copy, part)


def test_a_part_does_not_read_tensors_of_another(checkpoint_copy: Path) -> None:
    rewrite(checkpoint_copy, lambda tensors: tensors.update({KEYS["decoder"]: torch.zeros(1)}))
    load_tower(checkpoint_copy, FP32)


@pytest.mark.parametrize("part", ["tower", "decoder"])
def test_a_truncated_file_is_named(checkpoint_copy: Path, part: str) -> None:
    cut_short(checkpoint_copy / "model.safetensors", keep=5_000)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or truncated"):
        load_part(checkpoint_copy, part)


def test_tied_embeddings_need_no_head(checkpoint_copy: Path) -> None:
    rewrite(checkpoint_copy, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head.weight"):
        load_language_side(checkpoint_copy, FP32)
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    decoder = load_language_side(checkpoint_copy, FP32).decoder
    assert decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight


def test_tiles_and_tower_must_agree(checkpoint_copy: Path) -> None:
    sides = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    edit_json(checkpoint_copy / "preprocessor_config.json", lambda config: config.update(sides))
    with pytest.raises(CheckpointError, match=r"tiles of 56 pixels.*takes 28"):
        load_tower(checkpoint_copy, FP32)


@pytest.mark.parametrize("device", ["cud", "gpu", "cuda:x", "meta"])
def test_an_unknown_device_is_refused_by_name(device: str) -> None:
    with pytest.raises(CheckpointError, match=f"device '{device}' is unknown; known are cpu, cuda and cuda:N"):
        LoadOptions(device)


def test_cuda_is_refused_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CheckpointError, match=r"device cuda calls for CUDA, and torch .* finds none"):
        LoadOptions("cuda")
