"""Packed linear layers compute the same as plain ones, and only suitable layers are packed."""

import pytest
import torch
from torch import nn

from llava_core.kernels.packed import PackedLinear, pack_linears

SUPPORTED = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not SUPPORTED, reason="the processor has no kernels for bfloat16")


@needs_bf16
@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (1, 5, 96), (2, 3, 4, 96)])
def test_a_packed_layer_computes_the_same_as_the_plain_one(shape: tuple[int, ...], *, bias: bool) -> None:
    linear = nn.Linear(96, 40, bias=bias).bfloat16()
    rows = torch.randn(shape).bfloat16()
    exact = nn.functional.linear(rows.double(), linear.weight.double(), linear.bias.double() if bias else None)
    packed = PackedLinear(linear)(rows)
    assert packed.dtype == torch.bfloat16
    assert packed.shape == (*shape[:-1], 40)
    torch.testing.assert_close(packed.double(), exact, atol=0.02, rtol=0.02)


@needs_bf16
def test_exactly_the_plain_bfloat16_layers_are_packed() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "plain": nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.GELU(), nn.Linear(8, 8).bfloat16()),
            "float32": nn.Linear(8, 8),
            "special": Special(8, 8).bfloat16(),
        }
    )
    assert pack_linears(model) == 2
    assert [type(child) for child in model["plain"]] == [PackedLinear, nn.GELU, PackedLinear]
    assert type(model["float32"]) is nn.Linear
    assert type(model["special"]) is Special
    assert pack_linears(model) == 0


def test_without_bfloat16_kernels_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = nn.Sequential(nn.Linear(8, 8).bfloat16())
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear
