"""Completeness, checked by tensor names alone: a complete checkpoint of any layout passes; every gap is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_core.checkpoints.accounting import check_loadable, check_tensors
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.errors import CheckpointError
from tests.original import Kind, write_original
from tests.tiny import cut_short, edit_json, write_json, write_weights

FP32 = LoadOptions(dtype="float32")


@pytest.mark.parametrize("names", ["hub", "saved", "module"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_complete_checkpoint_passes(write_copy: Callable[..., Path], names: str, num_shards: int) -> None:
    check_tensors(write_copy(names=names, num_shards=num_shards))


def test_every_missing_tensor_is_named(checkpoint_copy: Path) -> None:
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
    with pytest.raises(CheckpointError, match="2 decoder layers, the files hold 1; missing: layer 1"):
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


def test_integers_are_refused_with_their_type(checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    write_weights(checkpoint_copy, {**tensors, name: tensors[name].to(torch.int8)})
    checkpoint = open_checkpoint(checkpoint_copy)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight in .* holds numbers of type int8: .* --quantization"):
        check_loadable(checkpoint, num_tokens(checkpoint))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds integers"):
        load_language_side(checkpoint, FP32)


def test_a_truncated_file_is_named(checkpoint_copy: Path) -> None:
    cut_short(checkpoint_copy / "model.safetensors", keep=2_000)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        check_tensors(checkpoint_copy)


def num_tokens(checkpoint: Checkpoint) -> int:
    return load_tokenizer(checkpoint).num_tokens


@pytest.mark.parametrize("layout", ["full", "projector", "lora"])
def test_a_checkpoint_that_passes_the_check_loads(tmp_path: Path, layout: str) -> None:
    original = write_original(tmp_path, Kind(layout=layout, aspect="anyres", merge="spatial_unpad", pad_rows=3))
    checkpoint = open_checkpoint(original.folder, original.base)
    check_loadable(checkpoint, num_tokens(checkpoint))
    load_language_side(checkpoint, FP32)


def test_all_faults_are_reported_together(checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    del tensors["language_model.model.norm.weight"]
    write_weights(checkpoint_copy, {**tensors, "multi_modal_projector.linear_2.bias": torch.zeros(5)})
    checkpoint = open_checkpoint(checkpoint_copy)
    with pytest.raises(CheckpointError) as caught:
        check_loadable(checkpoint, 1000)
    assert "decoder model.norm.weight is missing" in str(caught.value)
    assert "projector 2.bias has shape (5,)" in str(caught.value)
    assert "the tokenizer has 1000 tokens, but vocab_size" in str(caught.value)


def write_adapter(folder: Path, base: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    matrices = {"q_proj.lora_A": torch.zeros(2, 32), "q_proj.lora_B": torch.zeros(32, 2)}
    module = "base_model.model.model.language_model.layers.0.self_attn"
    named = {f"{module}.{name}.weight": value for name, value in matrices.items()}
    save_file({**named, **tensors}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    write_json(folder / "adapter_config.json", config)
    return open_checkpoint(folder)


def test_full_tensors_of_an_adapter_replace_those_of_the_base(tmp_path: Path, checkpoint_copy: Path) -> None:
    tensors = load_file(checkpoint_copy / "model.safetensors")
    name = "language_model.model.embed_tokens.weight"
    write_weights(checkpoint_copy, {**tensors, name: tensors[name][:-5]})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight has shape \(255, 32\)"):
        check_loadable(open_checkpoint(checkpoint_copy), 260)
    whole = {"base_model.model.model.language_model.embed_tokens.weight": tensors[name]}
    check_loadable(write_adapter(tmp_path / "adapter", checkpoint_copy, whole), 260)
    surplus = {"base_model.model.model.language_model.layers.7.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="2 decoder layers, the files hold 3; surplus: layer 7"):
        check_loadable(write_adapter(tmp_path / "other", checkpoint_copy, surplus), 260)


def test_a_damaged_adapter_does_not_hide_other_faults(tmp_path: Path, checkpoint_copy: Path) -> None:
    checkpoint = write_adapter(tmp_path / "adapter", checkpoint_copy, {})
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors or \.bin.*the tokenizer has 1000 tokens"):
        check_loadable(checkpoint, 1000)


def test_a_base_of_another_shape_is_reported_once_per_weight(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    assert original.base is not None
    tensors = load_file(original.base / "model.safetensors")
    names = [name for name in tensors if name.endswith("proj.weight")]
    save_file({**tensors, **{name: torch.zeros(3, 3) for name in names}}, original.base / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_loadable(open_checkpoint(original.folder, original.base), original.num_tokens)
    *faults, more = str(caught.value).split("; ")
    assert len(set(faults)) == 5
    assert all("it is the wrong base, so name the right one with --base" in each for each in faults)
    assert more == f"and {len(names) - 5} more, which llava inspect lists"
