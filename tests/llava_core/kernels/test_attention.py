"""Attention with written-out scores against its definition, and the cases where torch's fused attention is used."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llava_core.kernels import attention
from llava_core.kernels.attention import attend, kept_dtype

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no kernels for bfloat16"
)


def definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query.double() @ key.double().transpose(-1, -2) * scale
    return (scores if mask is None else scores + mask.double()).softmax(-1) @ value.double()


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.sampled_from([4, 20, 64])),
    num_keys=st.integers(1, 50),
    is_masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    is_transposed=st.booleans(),
    score_bytes=st.sampled_from([1, 5000, 2**22]),
)
@torch.no_grad()
def test_attention_is_softmax_of_scaled_scores(
    shape: tuple[int, int, int, int],
    num_keys: int,
    *,
    is_masked: bool,
    dtype: torch.dtype,
    is_transposed: bool,
    score_bytes: int,
) -> None:
    batch, heads, num_queries, head_dim = shape
    generator = torch.Generator().manual_seed(num_keys)

    def draw(length: int) -> Tensor:
        if is_transposed:
            return torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)

    query, key, value = draw(num_queries), draw(num_keys), draw(num_keys)
    mask = None
    if is_masked:
        hidden = torch.rand(num_queries, num_keys, generator=generator) < 0.5
        hidden[:, 0] = False
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_SCORE_BYTES", score_bytes)
        output = attend(query, key, value, mask, scale=0.3)
    assert output.dtype == dtype
    expected = definition(query, key, value, mask, 0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@needs_bf16
def test_scores_are_written_out_only_in_bfloat16_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, *rest: Tensor, **options: float) -> Tensor:
        calls.append(query.dtype)
        return fused(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    part = torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        attend(part.bfloat16(), part.bfloat16(), part.bfloat16(), scale=1.0)
        assert calls == []
        attend(part, part, part, scale=1.0)
        attend(part.half(), part.half(), part.half(), scale=1.0)
    learning = part.bfloat16().requires_grad_()
    attend(learning, learning, learning, scale=1.0).sum().backward()
    assert calls == [torch.float32, torch.float16, torch.bfloat16]
    assert learning.grad is not None


def test_a_mask_or_dropout_from_transformers_is_refused() -> None:
    part = torch.zeros(1, 1, 2, 4)
    with pytest.raises(AssertionError, match="have no attention mask"):
        attention._forward(nn.Identity(), part, part, part, torch.zeros(2, 2), scaling=1.0)
    with pytest.raises(AssertionError, match="dropout"):
        attention._forward(nn.Identity(), part, part, part, None, scaling=1.0, dropout=0.1)


def test_float16_is_widened_only_on_the_cpu() -> None:
    assert kept_dtype(torch.float16, "cpu") == torch.float32
    assert kept_dtype(torch.float16, "cuda:0") == torch.float16
    assert kept_dtype(torch.bfloat16, "cpu") == torch.bfloat16
