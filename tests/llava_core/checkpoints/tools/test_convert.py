"""Conversion both ways: transformers loads the result, answers stay the same, round trips keep all bytes of tensors."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_core.asking import original_ids
from llava_core.checkpoints.contents import stored_tensors
from llava_core.checkpoints.files import find_tensors, read_json
from llava_core.checkpoints.keymaps import HEAD_KEY, Key
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.load import LoadOptions
from llava_core.checkpoints.tensors import read_tensors
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.checkpoints.tools.convert import _known_tower, convert
from llava_core.checkpoints.towers import KNOWN_TOWERS
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.inference import LocalModel
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.vision.clip import normalise
from tests.original import SP_SIZE, Kind, answer_plainly, write_original
from tests.served import first_logits
from tests.test_original_checkpoints import IMAGES, ask
from tests.tiny import build_text_config, build_tokenizer, edit_json, write_checkpoint

FP32 = LoadOptions(dtype="float32")
ORIGINALS = {
    "llama": Kind(num_shards=2),
    "bin": Kind(files="bin", num_shards=3),
    "slow tokenizer": Kind(tokenizer="slow"),
    "mistral, square": Kind(decoder="mistral", aspect="square"),
    "cls_patch": Kind(select="cls_patch"),
    "anyres, own tower": Kind(aspect="anyres", merge="spatial_unpad", tower_inside=True),
    "spare rows": Kind(pad_rows=24),
}


def tensors_of(folder: Path) -> dict[Key, torch.Tensor]:
    """Returns the tensors by our keys, since layouts name them differently; the tower's too, wherever it is stored."""
    stored = stored_tensors(open_checkpoint(folder, offline=True).weights)
    return {key: read_tensors({each.name: each.file})[each.name] for key, each in stored.items()}


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def tokens_of(model: LocalModel) -> list[int]:
    prepared = model.preparer.prepare(ask(IMAGES))
    return [token for delta in model.stream(prepared) for token in delta.token_ids]


@pytest.mark.parametrize("name", ORIGINALS)
def test_an_original_survives_a_round_trip_byte_for_byte(tmp_path: Path, name: str) -> None:
    original = write_original(tmp_path / "source", ORIGINALS[name])
    edit_json(original.folder / "config.json", lambda config: config.update(mm_projector_lr=2e-5))
    convert(str(original.folder), tmp_path / "hf", "llava-hf", max_shard_size=30_000)
    convert(str(tmp_path / "hf"), tmp_path / "back", "original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "source"]
    before, after = tensors_of(original.folder), tensors_of(tmp_path / "back")
    assert set(before) == set(after)
    assert all(same_bytes(after[key], value) for key, value in before.items())
    # Under their original names too.
    own = read_tensors(find_tensors(original.folder))
    found = read_tensors(find_tensors(tmp_path / "back"))
    assert all(same_bytes(found[name], value) for name, value in own.items())
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (original.folder / file).exists():
            assert (tmp_path / "back" / file).read_bytes() == (original.folder / file).read_bytes()
    was, now = (read_json(folder, "config.json") for folder in (original.folder, tmp_path / "back"))
    moved = {"mm_vision_tower": str(tmp_path / "back/vision_tower"), "unfreeze_mm_vision_tower": True}
    assert now == {**was, **moved}


@pytest.mark.parametrize("name", [name for name in ORIGINALS if name not in ("slow tokenizer", "spare rows")])
def test_the_converted_original_answers_the_same_in_both_layouts(tmp_path: Path, name: str) -> None:
    original = write_original(tmp_path / "source", ORIGINALS[name])
    convert(str(original.folder), tmp_path / "hf", "llava-hf")
    convert(str(tmp_path / "hf"), tmp_path / "back", "original")
    source = LocalModel(original.folder, options=FP32, template="vicuna_v1")
    expected = tokens_of(source)
    ids = original_ids(source.preparer.prepare(ask(IMAGES)))
    assert expected == answer_plainly(original, ids, IMAGES, 24)[0]
    for folder in ("hf", "back"):
        model = LocalModel(tmp_path / folder, options=FP32, template="vicuna_v1")
        assert original_ids(model.preparer.prepare(ask(IMAGES))) == ids
        assert tokens_of(model) == expected


@pytest.mark.parametrize("name", ["llama", "mistral, square", "cls_patch", "anyres, own tower", "slow tokenizer"])
def test_transformers_computes_what_the_original_does(tmp_path: Path, name: str) -> None:
    kind = ORIGINALS[name]
    original = write_original(tmp_path / "source", kind)
    convert(str(original.folder), tmp_path / "hf", "llava-hf")
    is_next = kind.aspect == "anyres"
    cls = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    theirs, loading = cls.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    source = LocalModel(original.folder, options=FP32, template="vicuna_v1")
    prepared = source.preparer.prepare(ask(IMAGES))
    image_token = read_json(tmp_path / "hf", "config.json")["image_token_index"]
    ids = torch.tensor([[image_token if token == IMAGE_TOKEN_ID else token for token in prepared.prompt_ids]])
    pixels = [torch.from_numpy(image.tiles.copy()) for image in prepared.images]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tiles = [normalise(each, source.tower.preprocess) for each in pixels]
    if is_next:
        longest = max(len(each) for each in tiles)
        padded = [torch.cat([each, each.new_zeros(longest - len(each), *each.shape[1:])]) for each in tiles]
        given |= {"pixel_values": torch.stack(padded)}
        given |= {"image_sizes": torch.tensor([[i.size.height, i.size.width] for i in prepared.images])}
    else:
        given |= {"pixel_values": torch.cat(tiles)}
    with torch.inference_mode():
        logits = theirs(**given).logits[0, -1]
    expected = first_logits(source, prepared)
    torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-4, rtol=1e-4)
    # The row added for <image> is never the most likely.
    assert logits.argmax() == expected.argmax()
    assert all(logits[len(expected) :] < expected.max())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids("<image>") == image_token
    assert tokenizer("hi")["input_ids"][0] == 1
    GenerationConfig.from_pretrained(tmp_path / "hf").validate(strict=True)


@pytest.mark.parametrize("names", ["hub", "saved", "module"])
def test_a_llava_hf_model_survives_a_round_trip_byte_for_byte(
    tmp_path: Path, reference_model: LlavaForConditionalGeneration, names: str
) -> None:
    source = write_checkpoint(tmp_path / "source", reference_model, names=names, num_shards=2)  # type: ignore[arg-type]
    convert(str(source), tmp_path / "original", "original", max_shard_size=50_000)
    convert(str(tmp_path / "original"), tmp_path / "back", "llava-hf")
    for folder in ("original", "back"):
        before, after = tensors_of(source), tensors_of(tmp_path / folder)
        assert set(before) == set(after)
        assert all(same_bytes(after[key], value) for key, value in before.items())
    models = [LocalModel(folder, options=FP32, template="vicuna_v1") for folder in (source, tmp_path / "original")]
    assert tokens_of(models[0]) == tokens_of(models[1])
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back", dtype=torch.float32)
    expected = reference_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_a_written_original_has_the_fields_the_original_code_reads(tmp_path: Path, tiny_checkpoint: Path) -> None:
    convert(str(tiny_checkpoint), tmp_path / "original", "original")
    config = read_json(tmp_path / "original", "config.json")
    wanted = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 16,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_vision_tower": str(tmp_path / "original/vision_tower"),
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "rope_theta": 10000.0,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert not {"rope_parameters", "vision_config", "text_config"} & set(config)
    names = set(load_file(tmp_path / "original/model.safetensors"))
    assert {"model.mm_projector.0.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= names
    assert "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in names


def test_a_released_tower_is_named_and_not_copied(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(tower_inside=True))
    known = dict(KNOWN_TOWERS["openai/clip-vit-large-patch14"])
    config = open_checkpoint(original.folder).config
    large = replace(config, vision=replace(config.vision, image_size=224, architecture=known))
    plain = PreprocessConfig(size=224, aspect="pad")
    assert _known_tower(large, plain) == "openai/clip-vit-large-patch14"
    assert _known_tower(large, replace(plain, mean=(0.5, 0.5, 0.5))) is None
    gelu = replace(large, vision=replace(large.vision, architecture={**known, "hidden_act": "gelu"}))
    assert _known_tower(gelu, plain) is None


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Kind(projector="linear"), "projector_type 'linear' cannot be saved as llava-hf"),
        (Kind(s2=True), r"s2_scales \(28, 56\) cannot be saved"),
        (Kind(aspect="anyres", merge="spatial"), "merge_type 'spatial' cannot be saved .* with anyres tiles"),
        (Kind(aspect="anyres"), "merge_type 'flat' cannot be saved .*'spatial_unpad' only with anyres tiles"),
        (Kind(start_end=True), "image_start_end True cannot be saved"),
        (Kind(layout="projector"), "needs the model it was trained on"),
    ],
)
def test_what_llava_hf_cannot_express_is_refused_by_field(tmp_path: Path, kind: Kind, named: str) -> None:
    original = write_original(tmp_path / "source", kind)
    with pytest.raises(CheckpointError, match=named):
        convert(str(original.folder), tmp_path / "hf", "llava-hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_the_original_cannot_express_is_refused_by_field(checkpoint_copy: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(rope_parameters=scaling))
    with pytest.raises(CheckpointError, match=r"rope_parameters .* cannot be expressed in the original's"):
        convert(str(checkpoint_copy), tmp_path / "original", "original")


def test_siglip_survives_a_round_trip(tmp_path: Path) -> None:
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokenizer = build_tokenizer()
    config = LlavaConfig(
        vision_config=tower,
        text_config=build_text_config(len(tokenizer), 512),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    source = write_checkpoint(tmp_path / "source", model)
    edit_json(source / "preprocessor_config.json", lambda c: c.update(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    convert(str(source), tmp_path / "original", "original")
    convert(str(tmp_path / "original"), tmp_path / "back", "llava-hf")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert set(before) == set(after)
    assert all(same_bytes(after[key], value) for key, value in before.items())
    answers = [
        tokens_of(LocalModel(folder, options=FP32, template="vicuna_v1"))
        for folder in (source, tmp_path / "original", tmp_path / "back")
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("kind", [Kind(files="bin", num_shards=3), Kind(pad_rows=5, tower_inside=True)])
def test_converting_to_the_same_layout_rewrites_safetensors(tmp_path: Path, kind: Kind) -> None:
    original = write_original(tmp_path / "source", kind)
    convert(str(original.folder), tmp_path / "elsewhere/one", "original")
    assert not list((tmp_path / "elsewhere/one").glob("*.bin"))
    before, after = read_tensors(find_tensors(original.folder)), read_tensors(find_tensors(tmp_path / "elsewhere/one"))
    assert set(before) == set(after)
    assert all(same_bytes(after[name], value) for name, value in before.items())
    models = [LocalModel(f, options=FP32, template="vicuna_v1") for f in (original.folder, tmp_path / "elsewhere/one")]
    assert tokens_of(models[0]) == tokens_of(models[1])


def test_a_checkpoints_own_tower_is_copied(tmp_path: Path, tiny_checkpoint: Path) -> None:
    convert(str(tiny_checkpoint), tmp_path / "original", "original")
    convert(str(tmp_path / "original"), tmp_path / "copy", "original")
    assert read_json(tmp_path / "copy", "config.json")["mm_vision_tower"] == str(tmp_path / "copy/vision_tower")
    assert set(tensors_of(tmp_path / "copy")) == set(tensors_of(tiny_checkpoint))


def test_settings_changed_after_a_conversion_are_detected(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind())
    convert(str(original.folder), tmp_path / "hf", "llava-hf")
    edit_json(tmp_path / "hf/config.json", lambda config: config.update(vision_feature_layer=-1))
    with pytest.raises(CheckpointError, match=r"original/config\.json: vision is .*remove .*original"):
        convert(str(tmp_path / "hf"), tmp_path / "back", "original")


def test_layers_removed_after_a_conversion_are_detected(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind())
    convert(str(original.folder), tmp_path / "hf", "llava-hf")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    del model.model.language_model.layers[1:]
    model.config.text_config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 2, but the model's is 1; .*remove .*original"):
        convert(str(tmp_path / "hf"), tmp_path / "back", "original")


def save_again(folder: Path, *new_tokens: str) -> int:
    """Saves the model again, as training with transformers does; returns the resulting number of rows."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer.add_tokens(list(new_tokens))
    rows: int = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        rows = model.resize_token_embeddings(len(tokenizer)).num_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return rows


# Rows of the original, of the converted model, and of that with one more token: if `<image>` already is a token or
# takes a spare row, the row of the extra token looks just like one added for `<image>`.
VOCABULARIES = {
    "row added for <image>": (Kind(tokenizer="slow"), (SP_SIZE, SP_SIZE + 1, SP_SIZE + 2)),
    "<image> in the only spare row": (Kind(tokenizer="slow", pad_rows=1), (SP_SIZE + 1, SP_SIZE + 1, SP_SIZE + 2)),
    "<image> in one of many": (Kind(tokenizer="slow", pad_rows=4), (SP_SIZE + 4, SP_SIZE + 4, SP_SIZE + 4)),
    "<image> from the beginning": (Kind(), (260, 260, 261)),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokens_added_after_a_conversion_are_not_lost(tmp_path: Path, name: str) -> None:
    kind, rows = VOCABULARIES[name]
    original = write_original(tmp_path / "source", kind)
    convert(str(original.folder), tmp_path / "hf", "llava-hf")
    assert (open_checkpoint(original.folder).config.vocab_size, save_again(tmp_path / "hf")) == rows[:2]
    convert(str(tmp_path / "hf"), tmp_path / "same", "original")
    before, after = tensors_of(original.folder), tensors_of(tmp_path / "same")
    assert all(same_bytes(after[key], value) for key, value in before.items())
    assert save_again(tmp_path / "hf", "<new>") == rows[2]
    with pytest.raises(CheckpointError, match=r"tokens or rows have changed .*; remove .*original"):
        convert(str(tmp_path / "hf"), tmp_path / "back", "original")
    shutil.rmtree(tmp_path / "hf/original")
    convert(str(tmp_path / "hf"), tmp_path / "back", "original")
    assert load_tokenizer(tmp_path / "back").backend.token_id("<new>") is not None
    assert tensors_of(tmp_path / "back")[HEAD_KEY].shape[0] == rows[2]


def test_nothing_is_overwritten_and_an_incomplete_source_is_named(tmp_path: Path, checkpoint_copy: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists and is not overwritten"):
        convert(str(checkpoint_copy), tmp_path / "out", "original")
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="missing: layer 2"):
        convert(str(checkpoint_copy), tmp_path / "new", "original")
    assert not (tmp_path / "new").exists()


def test_pictures_are_prepared_the_same(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(aspect="square"))
    convert(str(original.folder), tmp_path / "hf", "llava-hf")
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "hf")
    source = LocalModel(original.folder, options=FP32, template="vicuna_v1")
    prepared = source.preparer.prepare(ask([IMAGES[0]]))
    ours = normalise(torch.from_numpy(prepared.images[0].tiles.copy()), source.tower.preprocess)
    torch.testing.assert_close(ours, theirs([IMAGES[0]], return_tensors="pt")["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["llava-hf", "original"])
@pytest.mark.parametrize("rows", [-3, 5])
def test_a_wrong_vocab_size_is_refused_and_rows_are_not_changed(
    tmp_path: Path, to: Literal["llava-hf", "original"], rows: int
) -> None:
    original = write_original(tmp_path / "source", Kind())
    edit_json(original.folder / "config.json", lambda config: config.update(vocab_size=config["vocab_size"] + rows))
    with pytest.raises(CheckpointError, match=r"decoder .* has shape .*, config\.json says"):
        convert(str(original.folder), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
