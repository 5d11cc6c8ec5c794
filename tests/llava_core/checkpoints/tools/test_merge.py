"""Merged models: equal to PEFT's merge, same answers as unmerged, and transformers loads and saves them."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlavaForConditionalGeneration

from llava_core.checkpoints.files import find_tensors, read_json
from llava_core.checkpoints.layout import find_layout, open_checkpoint
from llava_core.checkpoints.load import Dtype, LoadOptions, load_language_side
from llava_core.checkpoints.tensors import read_tensors
from llava_core.checkpoints.tools.merge import merge
from llava_core.errors import CheckpointError
from llava_core.inference import LocalModel
from tests.original import Kind, Original, random_tensor, write_json, write_original
from tests.served import first_logits
from tests.test_original_checkpoints import IMAGES, ask
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
LAYOUTS = {
    "LoRA": Kind(layout="lora"),
    "LoRA, anyres, mistral": Kind(layout="lora", decoder="mistral", aspect="anyres", merge="spatial_unpad"),
    "LoRA, sharded bin, own tower": Kind(layout="lora", files="bin", num_shards=3, tower_inside=True),
    "projector": Kind(layout="projector"),
    "projector, linear, slow tokenizer, spare rows": Kind(
        layout="projector", projector="linear", tokenizer="slow", pad_rows=9
    ),
}


def lower(folder: Path, dtype: torch.dtype) -> None:
    """Rewrites a folder's safetensors in another dtype."""
    for file in folder.glob("*.safetensors"):
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)


def answer(folder: Path, base: Path | None, dtype: Dtype) -> tuple[list[int], torch.Tensor]:
    """Returns greedy tokens and the logits of the first one."""
    checkpoint = open_checkpoint(folder, base, offline=True)
    model = LocalModel(checkpoint, options=LoadOptions(dtype=dtype), template="vicuna_v1")
    prepared = model.preparer.prepare(ask(IMAGES))
    tokens = [token for delta in model.stream(prepared) for token in delta.token_ids]
    return tokens, first_logits(model, prepared)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "stored"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_merged_model_answers_exactly_as_the_unmerged_one(
    tmp_path: Path, name: str, dtype: Dtype, stored: torch.dtype
) -> None:
    original = write_original(tmp_path / "source", LAYOUTS[name])
    assert original.base is not None
    if original.kind.files == "safetensors":
        lower(original.base, stored)
    elif dtype == "bfloat16":
        pytest.skip("the .bin base is float32")
    merge(str(original.folder), tmp_path / "elsewhere/merged", base=str(original.base), max_shard_size=40_000)
    merged = tmp_path / "elsewhere/merged"
    assert find_layout(merged) == "original"
    expected, got = answer(original.folder, original.base, dtype), answer(merged, None, dtype)
    assert got[0] == expected[0]
    # The last bits of a product depend on the memory alignment of its weights; the weights themselves are equal.
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)
    opened = (open_checkpoint(original.folder, original.base, offline=True), open_checkpoint(merged, offline=True))
    unmerged, weights = (load_language_side(each, LoadOptions(dtype=dtype)).state_dict() for each in opened)
    assert unmerged.keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in unmerged.items())
    tensors = read_tensors(find_tensors(merged))
    assert {value.dtype for key, value in tensors.items() if "layers" in key and "vision" not in key} == {stored}


def peft_merged(original: Original) -> dict[str, torch.Tensor]:
    """Loads the base with transformers and merges the adapter with PEFT."""
    assert original.base is not None
    model = AutoModelForCausalLM.from_pretrained(original.base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    wrapped = peft.get_peft_model(model, config)
    adapter = torch.load(original.folder / "adapter_model.bin", weights_only=True)
    peft.set_peft_model_state_dict(wrapped, adapter)
    merged: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


def test_merged_weights_equal_pefts_and_the_rest_the_base(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(layout="lora"))
    expected = peft_merged(original)
    merge(str(original.folder), tmp_path / "merged", base=str(original.base))
    tensors = load_file(tmp_path / "merged/model.safetensors")
    assert set(expected) <= set(tensors)
    for name, value in expected.items():
        torch.testing.assert_close(tensors[name], value)
    assert set(tensors) - set(expected) == {name for name in original.weights if "mm_projector" in name}
    # transformers loads the merged model's decoder as text-only, and saves it again.
    config = LlamaConfig(**read_json(tmp_path / "merged", "config.json"))
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    model.save_pretrained(tmp_path / "again")


def test_sampling_settings_without_do_sample_are_removed(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(layout="lora"))
    assert original.base is not None
    write_json(original.base / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]})
    merge(str(original.folder), tmp_path / "merged", base=str(original.base))
    config = GenerationConfig.from_pretrained(tmp_path / "merged")
    config.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "merged").config.eos_token_ids == (2, 5)


HF, ORIGINAL = "model.language_model.layers.0", "model.layers.0"
TOWERS = "model.vision_tower.encoder.layers.0", "model.vision_tower.vision_tower.vision_model.encoder.layers.0"


@pytest.mark.parametrize("layout", ["llava-hf", "original"])
@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_a_peft_adapter_merges_into_a_whole_llava(
    tmp_path: Path, reference_model: LlavaForConditionalGeneration, part: str, layout: str
) -> None:
    if layout == "llava-hf":
        base = write_checkpoint(tmp_path / "base", reference_model)
        layer = {"decoder": HF, "tower": TOWERS[0]}[part]
    else:
        base = write_original(tmp_path / "source", Kind()).folder
        layer = {"decoder": ORIGINAL, "tower": TOWERS[1]}[part]
    side = 32 if part == "decoder" else 16
    generator = torch.Generator().manual_seed(3)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    matrices = {"A": random_tensor(generator, 2, side), "B": random_tensor(generator, side, 2)}
    tensors = {
        f"base_model.model.{layer}.self_attn.q_proj.lora_{half}.weight": value for half, value in matrices.items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "base_model_name_or_path": str(base)}
    write_json(adapter / "adapter_config.json", config)
    merge(str(adapter), tmp_path / "merged")
    assert find_layout(tmp_path / "merged") == layout
    expected, got = answer(adapter, None, "float32"), answer(tmp_path / "merged", None, "float32")
    assert got[0] == expected[0]
    assert torch.equal(got[1], expected[1])
    assert not torch.equal(got[1], answer(base, None, "float32")[1])


def test_a_whole_model_has_nothing_to_merge(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a whole model; there is nothing to merge"):
        merge(str(tiny_checkpoint), tmp_path / "merged")


def test_a_wrong_base_is_named_and_no_files_are_left(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(layout="lora"))
    file = original.folder / "adapter_model.bin"
    matrices = torch.load(file, weights_only=True)
    wrong = {
        name: torch.zeros(7, 4) if name.endswith("layers.1.mlp.up_proj.lora_B.weight") else value
        for name, value in matrices.items()
    }
    torch.save(wrong, file)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight of shape \(7, 32\), but the base has \(48, 32\)"):
        merge(str(original.folder), tmp_path / "merged", base=str(original.base))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tensor_that_an_adapter_replaces_must_have_its_shape(tmp_path: Path) -> None:
    original = write_original(tmp_path / "source", Kind(layout="lora"))
    assert original.base is not None
    file = next(original.folder.glob("adapter_model.*"))
    head = {"base_model.model.lm_head.weight": torch.zeros(7, 32)}
    if file.suffix == ".bin":
        torch.save({**torch.load(file, weights_only=True), **head}, file)
    else:
        save_file({**load_file(file), **head}, file)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(7, 32\) in .*, config\.json says"):
        merge(str(original.folder), tmp_path / "out", base=str(original.base), offline=True)
    assert not (tmp_path / "out").exists()
