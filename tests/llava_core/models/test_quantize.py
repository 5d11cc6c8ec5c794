"""8 and 4 bits: stored weights and computed results, against arithmetic written out here."""

import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from llava_core.errors import CheckpointError
from llava_core.models import quantize as quantize_module
from llava_core.models.quantize import check_layers, check_quantization, quantize
from tests.tiny import build_text_config

# The 16 levels of NF4: Dettmers et al., "QLoRA" (2023), appendix E.
BELOW = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500)
ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
NF4 = torch.tensor([*BELOW, 0.0, *ABOVE])


def make_decoder(**sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = build_text_config(64, 128)
    for name, value in {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, **sizes}.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).eval()


def nearest_nf4(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = ((blocks / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[levels] * scale).reshape(weight.shape)


def nearest_int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.half().float().abs().amax(1, keepdim=True) / 127
    return (weight.half().float() / scale).round() * scale


@pytest.mark.parametrize(("kind", "rounded", "tolerance"), [("8bit", nearest_int8, 2e-2), ("4bit", nearest_nf4, 5e-3)])
def test_a_layer_computes_with_its_rounded_weights(kind: Any, rounded: Any, tolerance: float) -> None:
    decoder = make_decoder()
    weight = decoder.model.layers[0].mlp.up_proj.weight.detach().clone()
    quantize(decoder, kind, device="cpu", dtype=torch.float32)
    inputs = torch.randn(2, 5, weight.shape[1])
    expected = inputs @ rounded(weight).T
    got = decoder.model.layers[0].mlp.up_proj(inputs)
    # In 8 bits the input is rounded too, to 127 steps per row; in 4 bits a CPU keeps its scales in bfloat16.
    assert (got - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_linear_layers_but_the_head_are_replaced_and_dtype_kept(kind: Any, dtype: torch.dtype) -> None:
    decoder = make_decoder().to(dtype)
    linear = [name for name, layer in decoder.named_modules() if type(layer) is nn.Linear]
    quantize(decoder, kind, device="cpu", dtype=dtype)
    left = [name for name, layer in decoder.named_modules() if type(layer) is nn.Linear]
    assert len(linear) == 1 + 2 * 7
    assert left == ["lm_head"]
    logits = decoder(torch.arange(3, 20)[None]).logits
    assert logits.dtype == decoder.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_replaced_layers_are_freed_one_by_one(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder()
    built: list[weakref.ref[nn.Module]] = []
    name = f"llava_core.models.quantize._build_{kind}"
    build = vars(quantize_module)[f"_build_{kind}"]

    def watched(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
        assert not [each for each in built if each() is not None]
        built.append(weakref.ref(layer.weight))
        new: nn.Module = build(layer, dtype)
        return new

    monkeypatch.setattr(name, watched)
    quantize(decoder, kind, device="cpu", dtype=torch.float32)
    assert len(built) == 2 * 7


def test_quantisation_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    decoder = make_decoder()
    with caplog.at_level(logging.INFO):
        quantize(decoder, "8bit", device="cpu", dtype=torch.float32)
        decoder(torch.arange(3, 20)[None])
    assert not caplog.records


def test_row_sizes_that_fail_in_4_bits_on_a_cpu_are_refused() -> None:
    odd = make_decoder(intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj has 96; use 8bit, or a GPU"):
        check_layers(odd, "4bit", device="cpu")
    check_layers(odd, "8bit", device="cpu")
    check_layers(odd, "4bit", device="cuda")
    check_layers(make_decoder(), "4bit", device="cpu")


def test_unavailable_quantisation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantization(None)
    with pytest.raises(CheckpointError, match="quantization '2bit' is unknown; known are 8bit and 4bit"):
        check_quantization("2bit")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"needs bitsandbytes, which is not installed: pip install 'llava-serve"):
        check_quantization("4bit")
