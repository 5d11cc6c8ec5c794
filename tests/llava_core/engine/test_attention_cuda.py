"""GPU attention against reference and definition: on a GPU if there is one, otherwise in Triton's interpreter; and, on
a GPU, recorded graphs."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.attention import ReferenceBackend
from llava_core.engine.attention_cpu import CpuBackend
from llava_core.engine.attention_cuda import CudaBackend, DecodeBatch
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from tests.llava_core.engine.conftest import make_request
from tests.llava_core.engine.packed import SCALE, Layout, Packed, layouts
from tests.llava_core.engine.rerun import RerunBackend
from tests.llava_core.engine.test_engine import run

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
windows = st.none() | st.integers(1, 600)
# Block sizes of which some end a part of a long text, and head sizes that are not powers of two.
any_layout = layouts(block_sizes=(3, 16, 256), head_dims=(20, 64))


@settings(max_examples=25)
@given(layout=any_layout, window=windows)
def test_gpu_attention_equals_reference_and_definition(layout: Layout, window: int | None) -> None:
    packed = Packed(layout, device=DEVICE)
    output = packed.attend(CudaBackend(), window)
    torch.testing.assert_close(output, packed.attend(ReferenceBackend(), window), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.cpu(), packed.expected(window).cpu(), atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(layout=any_layout, window=windows)
def test_foreign_cache_content_does_not_change_a_bit(layout: Layout, window: int | None) -> None:
    packed = Packed(layout, device=DEVICE)
    clean, dirty = (packed.attend(CudaBackend(), window, garbage=value) for value in (0.0, torch.nan))
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("window", [None, 1, 70, 300])
def test_a_decode_step_reads_positions_and_table_from_tensors(window: int | None) -> None:
    """The table is as wide as the longest possible text; its unused columns name other requests' blocks."""
    packed = Packed(
        Layout(16, 2, 3, 20, tuple((n, 1, 0) for n in (0, 15, 16, 255, 256, 599)), 0, True, seed=3), device=DEVICE
    )
    table = torch.zeros(len(packed.spans), 64, dtype=torch.int64)
    for row, span in zip(table, packed.spans, strict=True):
        row[: len(span.blocks)] = torch.tensor(span.blocks)
    positions = torch.tensor([span.length - 1 for span in packed.spans], device=DEVICE)
    cache = packed.cache()
    batch = DecodeBatch(cache, positions, table.to(DEVICE))
    new = [torch.cat([part[-1:] for part in parts]) for parts in (packed.keys, packed.values)]
    output = batch.attend(0, packed.query, *new, SCALE, window)
    torch.testing.assert_close(output, packed.expected(window), atol=1e-5, rtol=1e-5)


def test_neighbours_do_not_change_a_bit() -> None:
    requests = ((599, 1, 0), (3, 1, 0), (1200, 1, 0))
    alone, among = (
        Packed(Layout(16, 2, 2, 64, together, 0, is_scattered=True, seed=1), device=DEVICE)
        for together in (requests[:1], requests)
    )
    for ours, theirs in ((alone.keys, among.keys), (alone.values, among.values)):
        theirs[0].copy_(ours[0])
    among.query[0].copy_(alone.query[0])
    assert torch.equal(alone.attend(CudaBackend())[0], among.attend(CudaBackend())[0])


def test_keys_and_values_keep_the_models_dtype() -> None:
    assert CudaBackend().cache_dtype(torch.bfloat16) == torch.bfloat16


@needs_gpu
@settings(max_examples=40)
@given(layout=layouts(block_sizes=(16, 256), head_dims=(64, 128)), window=windows)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close(layout: Layout, window: int | None, dtype: torch.dtype) -> None:
    packed = Packed(layout, device="cuda")
    output = packed.attend(CudaBackend(), window, dtype=dtype)
    assert output.dtype == dtype
    reference = packed.attend(ReferenceBackend(), window, dtype=dtype)
    torch.testing.assert_close(output.float(), reference.float(), atol=0.02, rtol=0.02)
    torch.testing.assert_close(output.float().cpu(), packed.expected(window).cpu(), atol=0.05, rtol=0.05)


class RerunCudaBackend(CudaBackend):
    """Reruns steps in place of graphs, which need a GPU."""

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return RerunBackend().record(step)


@pytest.mark.parametrize("window", [None, 9])
def test_an_engine_with_graphs_answers_like_one_on_the_cpu(
    language_side: LanguageSide, tiny_checkpoint: Path, window: int | None
) -> None:
    """Float32 on both sides; requests of many lengths come and go, and some are preempted."""
    requests = [make_request(f"{i}", seed=i, num_images=i % 3, max_tokens=3 + 5 * (i % 4)) for i in range(8)]
    on_gpu = CudaBackend() if DEVICE == "cuda" else RerunCudaBackend()
    answers, preemptions = [], []
    for device, backend in (("cpu", CpuBackend()), (DEVICE, on_gpu)):
        side = copy.deepcopy(language_side).to(device)
        ready_language(side)
        for layer in side.decoder.model.layers:
            layer.window = window
        limits = EngineConfig(max_running=5, max_step_tokens=64, prefill_chunk=16, cache_tokens=48, block_size=4)
        engine = Engine(side, load_tokenizer(tiny_checkpoint), limits, backend=backend)
        answers.append(run(engine, *requests))
        preemptions.append(engine.stats.num_preemptions)
    assert answers[0] == answers[1]
    assert preemptions[0] == preemptions[1] > 0


@needs_gpu
def test_a_graph_computes_what_its_recorded_step_does() -> None:
    """With new numbers in the same tensors, and two graphs that share memory and run in turns."""
    backend = CudaBackend()
    numbers = torch.arange(4.0, device="cuda")
    twice, squares = backend.record(lambda: numbers * 2), backend.record(lambda: numbers * numbers)
    for value in (3.0, 5.0):
        numbers.fill_(value)
        assert twice().tolist() == [2 * value] * 4
        assert squares().tolist() == [value * value] * 4
