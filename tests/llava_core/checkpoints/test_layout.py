"""Layout detection: every layout is recognised by its files and fields; missing or wrong parts are named at once."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_core.checkpoints.accounting import check_tensors
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.checkpoints.towers import KNOWN_TOWERS
from llava_core.errors import CheckpointError
from tests.hub import NEW, OLD, fill_cache, use_cache, write_lora
from tests.original import TOWER_CONFIG, Kind, Original, write_original
from tests.tiny import cut_short, edit_json, write_json

FP32 = LoadOptions(dtype="float32")
ANYRES = Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True)


def opened(original: Original) -> Checkpoint:
    return open_checkpoint(original.folder, original.base, offline=True)


def load(original: Original) -> None:
    checkpoint = opened(original)
    load_tower(checkpoint, FP32)
    load_language_side(checkpoint, FP32)


def test_a_llava_hf_folder_takes_no_base(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint, offline=True)
    assert (checkpoint.config.dialect, checkpoint.is_complete, checkpoint.adapter) == ("llava_hf", True, None)
    with pytest.raises(CheckpointError, match="takes no base; leave --base out"):
        open_checkpoint(tiny_checkpoint, tiny_checkpoint)


@pytest.mark.parametrize("inside", [False, True])
def test_weights_stored_quantised_are_refused(checkpoint_copy: Path, *, inside: bool) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    edit_json(checkpoint_copy / "config.json", lambda c: (c["text_config"] if inside else c).update(quantised))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config .*\(bitsandbytes\); load the model"):
        open_checkpoint(checkpoint_copy)


def test_a_projector_beside_a_complete_model_is_ignored(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    torch.save({}, original.folder / "mm_projector.bin")
    assert opened(original).is_complete


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    with pytest.raises(CheckpointError, match=r"somewhere/else, the base of .*, is neither"):
        open_checkpoint(original.folder, offline=True)
    edit_json(original.folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(original.base)))
    assert open_checkpoint(original.folder, offline=True).text_folder == original.base


def test_offline_all_missing_parts_are_listed_together(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    edit_json(original.folder / "config.json", lambda c: c.update(mm_vision_tower="openai/no-tower"))
    message = r"somewhere/else, the base of .*, is neither.*; openai/no-tower, the mm_vision_tower of .*, is neither"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(original.folder, offline=True)
    with pytest.raises(CheckpointError, match=r"no/model, the model, is neither.*; no/base, the base, is neither"):
        open_checkpoint("no/model", "no/base", offline=True)


@pytest.fixture
def hub_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds adapter, base and tower at revision OLD."""
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    for repo_id, folder in write_lora(tmp_path / "written").items():
        fill_cache(tmp_path / "cache", repo_id, {OLD: folder})
    return tmp_path / "cache"


def test_a_checkpoint_is_reopened_at_its_revisions(hub_lora: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint("owner/lora")
    assert checkpoint.revisions == {"owner/lora": OLD, "owner/base": OLD, "openai/tower": OLD}
    for repo_id in checkpoint.revisions:
        fill_cache(hub_lora, repo_id, {NEW: hub_lora / f"models--{repo_id.replace('/', '--')}" / "snapshots" / OLD})
    assert set(open_checkpoint("owner/lora").revisions.values()) == {NEW}
    # Without revisions, a folder of the tower's name is taken as the tower.
    shutil.copytree(tmp_path / "written" / "tower", tmp_path / "openai" / "tower")
    assert "openai/tower" not in open_checkpoint("owner/lora").revisions
    again = open_checkpoint("owner/lora", revisions=checkpoint.revisions)
    assert again == checkpoint
    assert {each.folder.name for each in again.weights} == {OLD}


def test_the_revision_of_a_peft_adapters_base_is_recorded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(monkeypatch, tmp_path / "cache")
    fill_cache(tmp_path / "cache", "owner/whole", {OLD: tiny_checkpoint})
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": "owner/whole"})
    assert open_checkpoint(tmp_path / "adapter").revisions == {"owner/whole": OLD}


def test_all_replicas_agree_on_the_tower_or_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One replica must not use the named tower while another uses the copy inside the checkpoint."""
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setitem(KNOWN_TOWERS, "openai/tower", TOWER_CONFIG)
    original = write_original(tmp_path, Kind(tower_inside=True))
    changes = {"unfreeze_mm_vision_tower": False, "mm_vision_tower": "openai/tower"}
    edit_json(original.folder / "config.json", lambda config: config.update(changes))
    without = open_checkpoint(original.folder)
    assert (without.revisions, len(without.weights)) == ({}, 1)
    fill_cache(tmp_path / "cache", "openai/tower", {OLD: tmp_path / "tower"})
    within = open_checkpoint(original.folder)
    assert (within.revisions, len(within.weights)) == ({"openai/tower": OLD}, 2)
    assert open_checkpoint(original.folder, revisions=without.revisions) == without
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CheckpointError, match=f"openai/tower at revision {OLD}, the mm_vision_tower"):
        open_checkpoint(original.folder, revisions=within.revisions)


def test_a_text_only_model_is_recognised_in_the_error(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    with pytest.raises(CheckpointError, match=rf"{original.base}/config\.json: there is neither .*perhaps a text-only"):
        open_checkpoint(str(original.base), offline=True)


def test_a_projector_is_never_assembled_from_two(tmp_path: Path) -> None:
    base = write_original(tmp_path / "whole", Kind())
    original = write_original(tmp_path, Kind(layout="projector"))
    load_language_side(open_checkpoint(original.folder, base.folder), FP32)
    file = original.folder / "mm_projector.bin"
    tensors = torch.load(file, weights_only=True)
    del tensors["model.mm_projector.2.bias"]
    torch.save(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing 1 \(2\.bias\)"):
        load_language_side(open_checkpoint(original.folder, base.folder), FP32)


def test_an_adapter_without_its_projector_is_refused(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(layout="lora"))
    (original.folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks non_lora_trainables\.bin.*config\.json is that of a LLaVA"):
        opened(original)
    # As it is in a checkpoint from within the training.
    (original.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks non_lora_trainables\.bin.*is a language model.*final output"):
        opened(original)


def test_an_adapter_from_within_a_training_over_a_llava_is_refused(tmp_path: Path) -> None:
    whole, original = (
        write_original(tmp_path / name, Kind(layout=layout)) for name, layout in (("whole", "full"), ("own", "lora"))
    )
    for name in ("non_lora_trainables.bin", "config.json"):
        (original.folder / name).unlink()
    # An adapter that was trained alone.
    assert open_checkpoint(original.folder, whole.folder).adapter == original.folder
    write_json(original.folder / "trainer_state.json", {"global_step": 10})
    with pytest.raises(CheckpointError, match=r"is from within a training.*resume the training"):
        open_checkpoint(original.folder, whole.folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
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


def test_the_named_tower_is_used_unless_it_was_trained(tmp_path: Path) -> None:
    original = write_original(tmp_path, ANYRES)
    inside = load_tower(opened(original), FP32).state_dict()
    edit_json(original.folder / "config.json", lambda config: config.update(unfreeze_mm_vision_tower=False))
    named = load_tower(opened(original), FP32).state_dict()
    name = "model.embeddings.class_embedding"
    assert torch.equal(inside[name], original.tower["vision_model.embeddings.class_embedding"])
    assert not torch.equal(named[name], inside[name])


@pytest.mark.parametrize("layout", ["lora", "projector"])
def test_the_trained_tower_of_a_base_is_used(tmp_path: Path, layout: str) -> None:
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
    """Changes, adds or (None) drops tensors of the single file; double underscores in names stand for dots."""
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


def test_an_unused_newline_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = write_original(tmp_path, Kind(aspect="anyres"))
    rewrite(original, model__image_newline=torch.zeros(32))
    with caplog.at_level(logging.INFO):
        check_tensors(opened(original))
    assert "image_newline is not used with mm_patch_merge_type flat" in caplog.text
    load(original)


def test_an_unexpected_newline_is_named(checkpoint_copy: Path) -> None:
    file = checkpoint_copy / "model.safetensors"
    save_file({**load_file(file), "image_newline": torch.zeros(32)}, file)
    with pytest.raises(CheckpointError, match="must not hold image_newline"):
        load_language_side(checkpoint_copy, FP32)
    with pytest.raises(CheckpointError, match="image_newline is present, which mm_patch_merge_type flat in"):
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
    with pytest.raises(CheckpointError, match=rf"has {original.num_tokens} tokens, .*config\.json is {rows}"):
        load(original)


def test_a_tokenizer_without_a_needed_token_is_named(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind())
    edit_json(original.folder / "config.json", lambda config: config.update(mm_use_im_start_end=True))
    with pytest.raises(CheckpointError, match=r"mm_use_im_start_end asks for <im_start>, but the tokenizer"):
        load_tokenizer(opened(original))
    (original.folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(opened(original))


def test_missing_tokens_are_added_if_the_model_has_rows_for_them(tmp_path: Path) -> None:
    original = write_original(tmp_path, Kind(pad_rows=3))
    edit_json(
        original.folder / "config.json",
        lambda config: config.update(mm_use_im_start_end=True, mm_use_im_patch_token=True),
    )
    tokenizer = load_tokenizer(opened(original))
    ids = [token for token, _, _ in tokenizer.encode("<im_patch><im_start><im_end>")]
    assert ids == [original.num_tokens, original.num_tokens + 1, original.num_tokens + 2]
