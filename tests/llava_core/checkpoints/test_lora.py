"""LoRA added while loading equals PEFT's own merge; adapters other than plain LoRA are refused by field."""

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from llava_core.checkpoints.keymaps import Key
from llava_core.checkpoints.lora import _PLAIN, open_lora
from llava_core.errors import CheckpointError
from tests.tiny import edit_json

# A warning between PEFT and transformers that does not concern us.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)


def save_adapter(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Saves a random adapter with PEFT; returns the merged weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(before, folder / "base.pt")
    adapter = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], **options)
    wrapped = peft.get_peft_model(model, adapter)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    ],
)
def test_merged_weights_equal_pefts(tmp_path: Path, options: dict[str, Any]) -> None:
    merged = save_adapter(tmp_path, **options)
    tensors = torch.load(tmp_path / "base.pt", weights_only=True)
    open_lora(tmp_path).apply("decoder", tensors, torch.float32)
    assert set(tensors) == set(merged)
    for name, value in merged.items():
        torch.testing.assert_close(tensors[name], value)


def test_untouched_weights_keep_their_dtype(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    tensors = {name: value.half() for name, value in torch.load(tmp_path / "base.pt", weights_only=True).items()}
    open_lora(tmp_path).apply("decoder", tensors, torch.bfloat16)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float16


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    lora = open_lora(tmp_path)
    assert Key("decoder", "model.layers.0.self_attn.q_proj.weight") in lora.pairs
    with pytest.raises(CheckpointError, match=r"of shape \(16, \d+\), but the base has none: it is the wrong base"):
        lora.apply("decoder", {}, torch.float32)
    tensors = torch.load(tmp_path / "base.pt", weights_only=True)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(8, 16)
    with pytest.raises(CheckpointError, match=r"but the base has \(8, 16\)"):
        lora.apply("decoder", tensors, torch.float32)


# Options that concern training, describe the adapter, or whose tensors have names that are not plain LoRA's.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("bias", "ensure_weight_tying", "lora_bias", "lora_dropout", "megatron_config", "megatron_core"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "target_modules"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    *("target_parameters", "trainable_token_indices", "velora_config"),
}
COMPUTED = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"}


def test_every_option_of_peft_is_known() -> None:
    """An option that is new in PEFT may change what an adapter means."""
    known = WITHOUT_EFFECT | COMPUTED | set(_PLAIN)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == known


def test_an_adapter_relative_to_changed_weights_is_refused(tmp_path: Path) -> None:
    """PiSSA subtracts the adapter's first value from the base, which the saved adapter does not tell."""
    save_adapter(tmp_path, init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match=r"init_lora_weights 'pissa' is not supported; merge the adapter with"):
        open_lora(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("r", 0),
    ],
)
def test_unsupported_adapters_are_refused_by_field(tmp_path: Path, field: str, value: object) -> None:
    save_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update({field: value}))
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {field}"):
        open_lora(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}, "lora_B alone"),
        ({"base_model.model.odd.lora_A.weight": 1, "base_model.model.odd.lora_B.weight": 1}, "unknown purpose: .*odd"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": 1}, "kind of LoRA that is not supported"),
        ({"surplus": 1}, "unknown purpose: surplus"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path: Path, change: dict[str, int | None], named: str) -> None:
    save_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in change.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        open_lora(tmp_path)


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors or \.bin"):
        open_lora(tmp_path)


@pytest.mark.parametrize("rank", [2, 64])
def test_a_rank_that_contradicts_the_matrices_is_refused(tmp_path: Path, rank: int) -> None:
    save_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(r=rank))
    with pytest.raises(CheckpointError, match=rf"matrices of rank 4 and 4, adapter_config\.json says {rank}"):
        open_lora(tmp_path)


def test_a_non_numeric_alpha_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(lora_alpha="8"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: lora_alpha must be a number above 0, not '8'"):
        open_lora(tmp_path)
