"""What a folder is: every layout is told by its files and fields, and what is missing or wrong is named at once."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.errors import CheckpointError
from tests.original import Kind, Original, write_original
from tests.tiny import cut_short, edit_json, write_json

FP32 = LoadOptions(dtype="float32")
ANYRES = Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True)


def opened(original: Original) -> Checkpoint:
    return open_checkpoint(original.folder, original.base, offline=True)


def load(original: Original) -> None:
    checkpoint = opened(original)
    load_tower(checkpoint, FP32)
    load_language_side(checkpoint, FP32)


def test_a_llava_hf_folder_needs_nothing_else(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint, offline=True)
    assert (checkpoint.config.dialect, checkpoint.is_complete, checkpoint.adapter) == ("llava_hf", True, None)
    with pytest.raises(CheckpointError, match="takes no base; leave --base out"):
        open_checkpoint(tiny_checkpoint, tiny_checkpoint)


@pytest.mark.parametrize("inside", [False, True])
def test_weights_that_are_stored_quantised_are_refused(checkpoint_copy: Path, *, inside: bool) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    edit_json(checkpoint_copy / "config.json", lambda c: (c["text_config"] if inside else c).update(quantised))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config .*\(bitsandbytes\); load the model"):
        open_checkpoint(checkpoint_copy)


def test_a_projector_beside_a_whole_model_is_a_copy(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    torch.save({}, original.folder / "mm_projector.bin")
    assert opened(original).is_complete


def test_a_base_without_a_name_is_asked_for(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="projector"))
    with pytest.raises(CheckpointError, match="needs the model it was trained on; name it with --base"):
        open_checkpoint(original.folder, offline=True)


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    with pytest.raises(CheckpointError, match="somewhere/else is neither"):
        open_checkpoint(original.folder, offline=True)
    edit_json(original.folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(original.base)))
    assert open_checkpoint(original.folder, offline=True).text_folder == original.base


def test_offline_everything_that_is_missing_is_listed_at_once(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    edit_json(original.folder / "config.json", lambda c: c.update(mm_vision_tower="openai/no-tower"))
    with pytest.raises(CheckpointError, match=r"somewhere/else is neither.*; .*mm_vision_tower 'openai/no-tower'"):
        open_checkpoint(original.folder, offline=True)


def test_a_base_of_another_size_is_named_with_both_numbers(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    assert original.base is not None
    edit_json(original.base / "config.json", lambda config: config.update(num_hidden_layers=40))
    with pytest.raises(CheckpointError, match=r"is the wrong base for .* its num_hidden_layers is 40, .* says 2"):
        opened(original)


def test_a_text_only_model_is_named_as_such(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    with pytest.raises(CheckpointError, match=rf"{original.base}: config\.json has neither .*perhaps a text-only"):
        open_checkpoint(str(original.base), offline=True)


def test_a_projector_is_never_put_together_of_two(tmp_path: Path) -> None:
    base = write_original(tmp_path / "whole", Kind())
    original = write_original(tmp_path, Kind(layout="projector"))
    load_language_side(open_checkpoint(original.folder, base.folder), FP32)
    file = original.folder / "mm_projector.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors["model.mm_projector.2.bias"]
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing 1 \(2\.bias\)"):
        load_language_side(open_checkpoint(original.folder, base.folder), FP32)


def test_an_adapter_without_its_projector_says_so(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    (original.folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"without non_lora_trainables\.bin.*text-only"):
        opened(original)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


def test_an_adapter_over_a_complete_llava_changes_it(tmp_path: Path, tiny_checkpoint: Path) -> None:
    weight = "language_model.model.layers.0.self_attn.q_proj.weight"
    before = load_file(tiny_checkpoint / "model.safetensors")[weight]
    down, up = torch.randn(2, before.shape[1]), torch.randn(before.shape[0], 2)
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(tiny_checkpoint)}
    write_json(tmp_path / "adapter_config.json", config)
    side = load_language_side(open_checkpoint(tmp_path), FP32)
    got = side.decoder.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(got, before + 3 * (up @ down))


def test_a_tower_that_was_not_trained_is_the_one_that_is_named(tmp_path: Path) -> None:
    original = write_original(tmp_path, ANYRES)
    inside = load_tower(opened(original), FP32).state_dict()
    edit_json(original.folder / "config.json", lambda config: config.update(unfreeze_mm_vision_tower=False))
    named = load_tower(opened(original), FP32).state_dict()
    name = "model.embeddings.class_embedding"
    assert torch.equal(inside[name], original.tower["vision_model.embeddings.class_embedding"])
    assert not torch.equal(named[name], inside[name])


@pytest.mark.parametrize("layout", ["lora", "projector"])
def test_what_is_trained_over_a_base_with_a_trained_tower_sees_with_it(tmp_path: Path, layout: str) -> None:
    base = write_original(tmp_path / "whole", ANYRES, seed=1)
    original = write_original(tmp_path / "over", Kind(layout=layout))
    edit_json(original.folder / "config.json", lambda config: config.update(unfreeze_mm_vision_tower=True))
    name = "model.embeddings.class_embedding"
    theirs = base.tower["vision_model.embeddings.class_embedding"]
    checkpoint = open_checkpoint(original.folder, base.folder, offline=True)
    check_tensors(checkpoint)
    assert torch.equal(load_tower(checkpoint, FP32).state_dict()[name], theirs)
    edit_json(original.folder / "config.json", lambda config: config.update(unfreeze_mm_vision_tower=False))
    frozen = open_checkpoint(original.folder, base.folder, offline=True)
    assert not torch.equal(load_tower(frozen, FP32).state_dict()[name], theirs)


def rewrite(original: Original, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) drop tensors of the single file; names with dots written with double underscores."""
    file = original.folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, file)


ONE_OF_EACH_PART = [
    "model__layers__1__mlp__up_proj__weight",
    "model__mm_projector__2__bias",
    "model__image_newline",
    "lm_head__weight",
    "model__vision_tower__vision_tower__vision_model__encoder__layers__0__mlp__fc1__bias",
]


@pytest.mark.parametrize("name", ONE_OF_EACH_PART)
def test_a_dropped_or_reshaped_key_is_named(tmp_path: Path, name: str) -> None:
    original = write_original(tmp_path, ANYRES)
    kept = name.split("vision_model__")[-1].replace("__", ".").removeprefix("model.mm_projector.").split(".")[-1]
    rewrite(original, **{name: torch.zeros(3, 1)})
    with pytest.raises(CheckpointError, match=rf"{kept}.* has shape \(3, 1\), config\.json says"):
        load(original)
    rewrite(original, **{name: None})
    with pytest.raises(CheckpointError, match=kept):
        check_tensors(opened(original))
    with pytest.raises(CheckpointError, match=kept):
        load(original)


@pytest.mark.parametrize(
    "name", ["model__vision_resampler__weight", "model__image_oldline", "transformer__wte__weight"]
)
def test_an_added_key_is_named(tmp_path: Path, name: str) -> None:
    original = write_original(tmp_path, ANYRES)
    rewrite(original, **{name: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"1 tensors of unknown purpose: {name.replace('__', '.')}"):
        load(original)
    with pytest.raises(CheckpointError, match=f"1 tensors of unknown purpose: {name.replace('__', '.')}"):
        check_tensors(opened(original))


def test_a_newline_that_nothing_reads_is_left_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = write_original(tmp_path, Kind(aspect="anyres"))
    rewrite(original, model__image_newline=torch.zeros(32))
    with caplog.at_level(logging.INFO):
        check_tensors(opened(original))
    assert "image_newline is not used with mm_patch_merge_type flat" in caplog.text
    load(original)


def test_a_newline_where_none_belongs_is_named(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "model.safetensors"
    save_file({**load_file(file), "image_newline": torch.zeros(32)}, file)
    with pytest.raises(CheckpointError, match="must not hold image_newline"):
        load_language_side(checkpoint_copy, FP32)
    with pytest.raises(CheckpointError, match="image_newline is there, which mm_patch_merge_type flat does not have"):
        check_tensors(checkpoint_copy)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(files="bin", num_shards=2))
    cut_short(original.folder / "pytorch_model-00002-of-00002.bin", keep=900)
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin is damaged"):
        load(original)


def test_a_tokenizer_with_more_tokens_than_rows_is_named(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    rows = original.num_tokens - 3
    edit_json(original.folder / "config.json", lambda config: config.update(vocab_size=rows))
    short = {
        name.replace(".", "__"): original.weights[name][:rows].clone()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    rewrite(original, **short)
    with pytest.raises(CheckpointError, match=rf"tokenizer has {original.num_tokens} tokens, .* vocab_size is {rows}"):
        load(original)


def test_a_tokenizer_without_a_needed_token_is_named(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    edit_json(original.folder / "config.json", lambda config: config.update(mm_use_im_start_end=True))
    with pytest.raises(CheckpointError, match=r"mm_use_im_start_end asks for <im_start>, but the tokenizer"):
        load_tokenizer(opened(original))
    (original.folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(opened(original))


def test_tokens_that_the_model_has_rows_for_are_added(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(pad_rows=3))
    edit_json(
        original.folder / "config.json",
        lambda config: config.update(mm_use_im_start_end=True, mm_use_im_patch_token=True),
    )
    tokenizer = load_tokenizer(opened(original))
    ids = [token for token, _, _ in tokenizer.encode("<im_patch><im_start><im_end>")]
    assert ids == [original.num_tokens, original.num_tokens + 1, original.num_tokens + 2]
