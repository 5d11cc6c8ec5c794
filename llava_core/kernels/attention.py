"""Softmax attention of many queries, in the way that is fastest on the processor.

On a CPU, the fused kernel computes half precision at a fraction of the rate of matrix products. There the scores are
materialised, a few heads at a time. Knows nothing about models, caches or requests; transformers' modules use it under
the name `dense`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "dense"
# Bytes of scores computed at a time. They are written and read again: more would not stay in the processor's cache.
_SCORE_BYTES = 4 * 2**20


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    """scaled_dot_product_attention for equally many heads of each: (batch, num_heads, num_queries, head_dim).

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
    """The dtype of cached keys and values for a model that computes in `dtype`: CPU attention lacks float16."""
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def _writes_out(query: Tensor) -> bool:
    """Whether to materialise the scores. Gradients would need all scores kept; float32 gains nothing."""
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
    """The function transformers calls in every layer of a tower: every position sees every other."""
    assert attention_mask is None, "towers have no attention mask"
    assert not dropout, "towers are not trained with dropout"
    return attend(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
