"""CPU attention against the reference and the definition, on any mixture of prompts and answers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.engine import attention_plan
from llava_core.engine.attention import ReferenceBackend
from llava_core.engine.attention_cpu import CpuBackend
from tests.llava_core.engine.packed import SCALE, Layout, Packed, layouts

windows = st.none() | st.integers(1, 20)
# Our own kernels handle head sizes of 16, 32, ...; torch handles the others.
shapes = layouts(head_dims=(8, 20, 16, 64))
# Two answers that share blocks, a prompt, and a request that has just started.
MIXED = Layout(3, 2, 3, 8, ((8, 1, 0), (9, 1, 2), (4, 5, 1), (0, 1, 0)), 1, is_scattered=True, seed=1)


@given(layout=shapes, window=windows)
def test_cpu_attention_equals_reference_and_definition(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    output = packed.attend(CpuBackend(), window)
    torch.testing.assert_close(output, packed.attend(ReferenceBackend(), window), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, packed.expected(window), atol=1e-5, rtol=1e-5)


@given(layout=shapes, window=windows)
def test_half_precision_is_close_to_the_definition(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    output = packed.attend(CpuBackend(), window, dtype=torch.bfloat16)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), packed.expected(window), atol=0.05, rtol=0.05)


@given(layout=shapes, window=windows)
def test_foreign_cache_content_does_not_change_a_bit(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    clean, dirty = (packed.attend(CpuBackend(), window, garbage=value) for value in (0.0, torch.nan))
    assert torch.equal(clean, dirty)


@given(layout=shapes, window=windows, long=st.integers(1, 20))
def test_the_threshold_for_long_texts_does_not_change_the_result(layout: Layout, window: int | None, long: int) -> None:
    packed = Packed(layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "_LONG", long)
        patch.setattr(attention_plan, "_LONG_ALONE", 2 * long)
        output, half = packed.attend(CpuBackend(), window), packed.attend(CpuBackend(), window, dtype=torch.bfloat16)
    torch.testing.assert_close(output, packed.expected(window), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half.float(), packed.expected(window), atol=0.05, rtol=0.05)


def test_nan_in_one_request_does_not_reach_others() -> None:
    packed = Packed(replace(MIXED, requests=((8, 1, 0), (9, 1, 0), (4, 5, 0), (0, 1, 0))))
    healthy = packed.attend(CpuBackend())
    packed.keys[1][0] = torch.nan
    packed.values[2][0] = torch.nan
    output = packed.attend(CpuBackend())
    assert torch.equal(output[[0, 7]], healthy[[0, 7]])
    assert output[1:7].isnan().any(-1).all()


def test_layers_with_and_without_a_window_share_a_batch() -> None:
    packed = Packed(MIXED)
    batch = CpuBackend().batch(packed.cache(), packed.spans)
    key, value = (
        torch.cat([part[-span.num_queries :] for part, span in zip(parts, packed.spans, strict=True)])
        for parts in (packed.keys, packed.values)
    )
    for window in (None, 4, None, 2):
        output = batch.attend(0, packed.query, key, value, SCALE, window)
        torch.testing.assert_close(output, packed.expected(window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [30.0, 1e3])
def test_extreme_scores_do_not_overflow(factor: float) -> None:
    packed = Packed(MIXED)
    packed.query *= factor
    torch.testing.assert_close(packed.attend(CpuBackend()), packed.expected(), atol=1e-4, rtol=1e-4)


@given(layout=layouts(head_dims=(16, 64)), window=windows)
def test_without_a_compiler_torch_gives_the_same_result(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    backend = CpuBackend(use_kernels=False)
    output, half = packed.attend(backend, window), packed.attend(backend, window, dtype=torch.bfloat16)
    torch.testing.assert_close(output, packed.expected(window), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half.float(), packed.expected(window), atol=0.05, rtol=0.05)


@given(layout=layouts(head_dims=(16,)), window=windows)
def test_attention_of_a_float16_model_runs_in_float32(layout: Layout, window: int | None) -> None:
    packed = Packed(layout)
    output = packed.attend(CpuBackend(), window, dtype=torch.float16)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), packed.expected(window), atol=0.01, rtol=0.01)


def test_a_result_does_not_depend_on_the_rest_of_the_batch() -> None:
    layout = Layout(16, 2, 2, 64, ((40, 1, 0), (9, 1, 0), (300, 1, 0)), 1, is_scattered=True, seed=1)
    packed = Packed(layout)
    together = packed.attend(CpuBackend(), dtype=torch.bfloat16)
    for row, span in enumerate(packed.spans):
        cache = packed.cache(torch.bfloat16, heads_first=True)
        query, key, value = (
            part.to(torch.bfloat16)
            for part in (packed.query[row][None], packed.keys[row][-1:], packed.values[row][-1:])
        )
        alone = CpuBackend().batch(cache, [span]).attend(0, query, key, value, SCALE, None)
        assert torch.equal(alone[0], together[row])


def test_the_cache_dtype_is_one_the_cpu_computes_in() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert [CpuBackend().cache_dtype(dtype) for dtype in dtypes] == [torch.bfloat16, torch.float32, torch.float32]
