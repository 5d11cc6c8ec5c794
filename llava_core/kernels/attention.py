"""Softmax attention of many queries, as the processor does it fastest.

A CPU's fused kernel computes half precisions at a fraction of the rate of its matrix products. There the scores are
written out, a few heads at a time. Knows nothing about models, caches or requests; transformers' modules reach it under
the name `dense`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "dense"
# Scores at a time. They are written and read again: more would not stay in the processor's cache.
_SCORE_BYTES = 4 * 2**20


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """What scaled_dot_product_attention computes, (batch, num_heads, num_queries, head_dim), of as many heads each.

    `mask` (num_queries, num_keys) is added to the scores and has their dtype.
    """
    if not _writes_out(query):
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    batch, num_heads, num_queries, head_dim = query.shape
    flat = batch * num_heads
    query, key, value = (part.reshape(flat, -1, part.shape[-1]) for part in (query, key, value))
    out = torch.empty_like(query)
    together = max(1, _SCORE_BYTES // (num_queries * key.shape[1] * query.itemsize))
    added, beta = (query.new_zeros(1), 0) if mask is None else (mask, 1)
    for first in range(0, flat, together):
        heads = slice(first, first + together)
        scores = torch.baddbmm(added, query[heads], key[heads].transpose(1, 2), beta=beta, alpha=scale)
        torch.bmm(scores.softmax(-1), value[heads], out=out[heads])
    return out.view(batch, num_heads, num_queries, head_dim)


def kept_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """What keys and values are kept in where a model computes in `dtype`: a CPU's attention knows no float16."""
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def _writes_out(query: Tensor) -> bool:
    """Gradients would need all scores kept; float32 gains nothing."""
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer of a tower: every position sees every other."""
    assert attention_mask is None, "towers hide nothing"
    assert not dropout, "towers are not trained with dropout"
    return attend(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
