"""A fused decoder computes the same as transformers' modules, and replaces only modules that it knows."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llava_core.checkpoints.layout import open_checkpoint
from llava_core.kernels.layer_gpu import GpuKernels
from llava_core.kernels.native import native_kernels
from llava_core.kernels.packed import PackedLinear
from llava_core.models.fused import FusedDecoder, Norm, ready_language
from llava_core.models.language import LanguageSide
from llava_core.models.quantize import quantize

DECODERS = {
    "grouped heads": {},
    "plain heads": {"num_key_value_heads": 4},
    "one head for all": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another activation": {"hidden_act": "gelu"},
    "scaled positions": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Mistral with a window": {"model_type": "mistral", "sliding_window": 3},
}


class Plain:
    """The simplest attention for a decoder: every token sees itself and those before it, within the window."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        length = len(query)
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        if window is not None:
            seen &= ~torch.ones_like(seen).tril(-window)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def build(folder: Path, dtype: torch.dtype = torch.float32, **text: object) -> LanguageSide:
    config = open_checkpoint(folder).config
    torch.manual_seed(0)
    side = LanguageSide(replace(config, text={**config.text, **text})).eval()
    for name, value in side.named_parameters():
        if name.endswith("bias") or "norm" in name:
            # Fresh biases and norms are 0 and 1, which would hide a missing one.
            value.data = value.data + torch.randn_like(value) * 0.3
    return side.to(dtype)


def hidden_states(side: LanguageSide, length: int) -> Tensor:
    model = side.decoder.model
    embeddings = torch.randn(1, length, side.config.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(3, 3 + length, device=side.device)[None]
    embeddings = embeddings.to(side.device, side.decoder.dtype)
    if isinstance(model, FusedDecoder):
        return model(embeddings, positions, Plain()).last_hidden_state
    return model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state


@torch.inference_mode()
@pytest.mark.parametrize("text", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("use_kernels", [True, False], ids=["our kernels", "torch's"])
def test_a_fused_decoder_computes_the_same_as_transformers(
    tiny_checkpoint: Path, text: dict[str, object], length: int, *, use_kernels: bool
) -> None:
    side = build(tiny_checkpoint, **text)
    fused = copy.deepcopy(side)
    ready_language(fused, use_kernels=use_kernels)
    assert isinstance(fused.decoder.model, FusedDecoder)
    torch.testing.assert_close(hidden_states(fused, length), hidden_states(side, length), atol=1e-5, rtol=1e-5)
    assert torch.equal(fused.decoder.get_input_embeddings().weight, side.decoder.get_input_embeddings().weight)


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("text", DECODERS.values(), ids=DECODERS)
def test_gpu_kernels_compute_the_same_as_transformers(tiny_checkpoint: Path, text: dict[str, object]) -> None:
    """Runs in Triton's interpreter if there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = build(tiny_checkpoint, **text).to(device)
    expected = hidden_states(side, 7)
    side.decoder.model = FusedDecoder(side.decoder.model, GpuKernels())
    torch.testing.assert_close(hidden_states(side, 7), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("tokens", [1, 32, 33])
@pytest.mark.parametrize("device", ["cpu", "none of ours"], ids=["our kernels", "torch's"])
def test_norms_of_few_and_many_tokens_equal_the_definition(
    tokens: int, scale: float, dtype: torch.dtype, device: str
) -> None:
    plain = LlamaRMSNorm(96, 1e-6).to(dtype)
    plain.weight.data.normal_()
    hidden = (torch.randn(tokens, 96) * scale + scale).to(dtype)
    added = (torch.randn(tokens, 96) * scale).to(dtype)
    summed = hidden + added
    exact = (
        summed.double() * torch.rsqrt(summed.double().square().mean(-1, keepdim=True) + 1e-6) * plain.weight.double()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    kept, normed = Norm(plain, native_kernels(dtype, device))(hidden, added)
    assert torch.equal(kept, summed)
    torch.testing.assert_close(normed.double(), exact, atol=tolerance, rtol=tolerance)


@torch.inference_mode()
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no kernels for bfloat16")
def test_half_precision_is_packed_and_stays_close(tiny_checkpoint: Path) -> None:
    side = build(tiny_checkpoint)
    half = copy.deepcopy(side).bfloat16()
    ready_language(half)
    assert not any(type(module) is nn.Linear for module in half.modules())
    assert isinstance(half.decoder.get_output_embeddings(), PackedLinear)
    torch.testing.assert_close(hidden_states(half, 7).float(), hidden_states(side, 7), atol=0.1, rtol=0.1)


def test_quantised_layers_keep_their_modules(tiny_checkpoint: Path) -> None:
    side = build(tiny_checkpoint)
    quantize(side.decoder, "8bit", device="cpu", dtype=torch.float32)
    model = side.decoder.model
    ready_language(side)
    assert side.decoder.model is model


# PEFT calls transformers by a deprecated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_keep_their_modules(tiny_checkpoint: Path) -> None:
    side = build(tiny_checkpoint)
    get_peft_model(side.decoder, LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = side.decoder.model
    ready_language(side)
    assert side.decoder.model is model
