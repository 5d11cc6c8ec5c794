"""The GPU's attention: what the kernel is told, against its documentation; and where there is a GPU, what comes out."""

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.attention import ReferenceBackend
from llava_core.engine.attention_cuda import CudaBackend
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.errors import EngineError
from llava_core.models.language import LanguageSide
from tests.llava_core.engine.packed import Layout, Packed, layouts

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
BLOCK_SIZE = CudaBackend.block_size


def documented_kernel(query: Tensor, key: Tensor, value: Tensor, *told: Any, **options: Any) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as its documentation has it, with pages of any size."""
    cu_seq_q, cu_seq_k, max_q, max_k = told
    lengths, table = options["seqused_k"], options["block_table"]
    groups = query.shape[1] // key.shape[2]
    assert cu_seq_k is None
    assert {part.dtype for part in (cu_seq_q, lengths, table)} == {torch.int32}
    assert options["enable_gqa"] or groups == 1
    left, right = options["window_size"]
    assert right == 0
    parts = []
    for row, (first, stop) in enumerate(pairwise(cu_seq_q.tolist())):
        length = int(lengths[row])
        assert stop - first <= max_q
        assert length <= max_k
        keys, values = (
            pages[table[row].long()].flatten(0, 1)[:length].repeat_interleave(groups, 1) for pages in (key, value)
        )
        places = torch.arange(length - (stop - first), length)[:, None]
        seen = torch.arange(length) <= places
        if left >= 0:
            seen &= torch.arange(length) >= places - left
        scores = torch.einsum("qhd,khd->hqk", query[first:stop], keys) * options["scale"]
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(parts)


@given(layout=layouts(), window=st.none() | st.integers(1, 20))
def test_the_kernel_is_told_what_belongs_to_whom(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    with patch("torch.nn.attention.varlen.varlen_attn", documented_kernel):
        seen = packed.attend(CudaBackend(), window)
    torch.testing.assert_close(seen, packed.expected(window), atol=1e-5, rtol=1e-5)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=40)
@given(
    layout=layouts(block_sizes=(BLOCK_SIZE,), head_dims=(64, 128)),
    window=st.none() | st.integers(1, 600),
)
def test_it_equals_reference_and_definition(layout: Layout, window: int | None, dtype: torch.dtype) -> None:
    packed = Packed(layout, device="cuda")
    seen = packed.attend(CudaBackend(), window, dtype=dtype)
    assert seen.dtype == dtype
    torch.testing.assert_close(
        seen.float(), packed.attend(ReferenceBackend(), window, dtype=dtype).float(), atol=0.02, rtol=0.02
    )
    torch.testing.assert_close(seen.float(), packed.expected(window), atol=0.05, rtol=0.05)


@needs_gpu
@settings(max_examples=20)
@given(layout=layouts(block_sizes=(BLOCK_SIZE,), head_dims=(64,)))
def test_what_is_not_a_requests_own_changes_not_a_bit(layout: Layout) -> None:
    packed = Packed(layout, device="cuda")
    clean, dirty = (packed.attend(CudaBackend(), dtype=torch.bfloat16, garbage=value) for value in (0.0, torch.nan))
    assert torch.equal(clean, dirty)


def test_keys_and_values_are_kept_as_the_model_has_them() -> None:
    assert CudaBackend().cache_dtype(torch.bfloat16) == torch.bfloat16


def test_blocks_that_the_gpus_kernel_does_not_take_are_refused_at_the_start(
    language_side: LanguageSide, tiny_checkpoint: Path
) -> None:
    with pytest.raises(EngineError, match="256"):
        Engine(language_side, load_tokenizer(tiny_checkpoint), EngineConfig(block_size=16), backend=CudaBackend())
