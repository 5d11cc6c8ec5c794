"""Paged attention with one query per request, against plain softmax; test_attention_cuda.py tests random mixtures."""

import pytest
import torch
from torch import Tensor

from llava_core.kernels.paged_decode import PART, attend_paged

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE, HEAD_DIM, SCALE = 16, 24, 0.2


def reference_attention(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Computes attention of `query` (heads, head_dim) over (length, kv_heads, head_dim), in float64."""
    first = 0 if window is None else max(0, len(keys) - window)
    groups = query.shape[0] // keys.shape[1]
    key, value = (part[first:].double().repeat_interleave(groups, 1) for part in (keys, values))
    weights = (torch.einsum("hd,khd->hk", query.double(), key) * SCALE).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 64, PART, 2 * PART + 1])
def test_every_row_sees_its_own_tokens(window: int | None, groups: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, BLOCK_SIZE, PART - 1, PART, PART + 1, 3 * PART + 5]
    blocks = torch.randperm(200, generator=generator)
    pages = torch.full((2, 200, BLOCK_SIZE, 2, HEAD_DIM), torch.nan)
    table = torch.zeros(len(lengths), 4 * PART // BLOCK_SIZE, dtype=torch.int64)
    # A slice of a larger tensor, as a fused projection returns it.
    query = torch.randn(len(lengths), 2 * groups + 4, HEAD_DIM, generator=generator).to(dtype)[:, : 2 * groups]
    expected, used = [], 0
    for row, length in enumerate(lengths):
        own = blocks[used : used + -(-length // BLOCK_SIZE)]
        used += len(own)
        table[row, : len(own)] = own
        for place in range(length):
            pages[:, own[place // BLOCK_SIZE], place % BLOCK_SIZE] = torch.randn(2, 2, HEAD_DIM, generator=generator)
        keys, values = pages[:, own].flatten(1, 2)[:, :length].to(dtype)
        expected.append(reference_attention(query[row], keys, values, window))
    output = attend_paged(
        query.to(DEVICE),
        *pages.to(DEVICE, dtype),
        table.to(DEVICE),
        torch.tensor(lengths, device=DEVICE),
        scale=SCALE,
        window=window,
    )
    assert output.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(output.cpu().double(), torch.stack(expected), atol=tolerance, rtol=tolerance)


def test_a_bound_on_the_length_does_not_change_the_result() -> None:
    query = torch.randn(1, 2, HEAD_DIM, device=DEVICE)
    pages = torch.randn(2, 40, BLOCK_SIZE, 2, HEAD_DIM, device=DEVICE)
    table, lengths = torch.arange(40, device=DEVICE)[None], torch.tensor([300], device=DEVICE)
    whole, bounded = (
        attend_paged(query, *pages, table, lengths, scale=SCALE, max_length=bound) for bound in (None, 300)
    )
    assert torch.equal(whole, bounded)
