"""Recorded decode steps: what a graph reads, which graph is chosen, padding rows; answers equal unrecorded steps."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.attention import ReferenceBackend
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.engine.graphs import DecodeGraphs, DecodeRow, batch_sizes, unpack_sheet
from llava_core.engine.runner import ModelRunner
from llava_core.engine.scheduler import Chunk
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from tests.llava_core.engine.conftest import make_request
from tests.llava_core.engine.rerun import RerunBackend
from tests.llava_core.engine.test_engine import run
from tests.llava_core.engine.test_runner import state_of


@pytest.fixture(params=[None, 9], ids=["all is seen", "sliding window"])
def fused(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> LanguageSide:
    config = open_checkpoint(tiny_checkpoint).config
    text = {**config.text, "model_type": "mistral", "sliding_window": request.param}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        side = LanguageSide(replace(config, text=text)).eval()
    ready_language(side)
    return side


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16]), (17, [1, 2, 4, 8, 16, 17])],
)
def test_graph_sizes_are_powers_of_two_up_to_the_maximum(max_rows: int, expected: list[int]) -> None:
    assert batch_sizes(max_rows) == expected


def test_a_step_uses_the_smallest_graph_and_pads_with_idle_rows() -> None:
    replays: list[Tensor] = []

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        step()
        return lambda: replays.append(step()) or replays[-1]

    graphs = DecodeGraphs(
        lambda sheet: sheet.clone(), record, max_rows=6, max_blocks=3, spare_block=99, device=torch.device("cpu")
    )
    idle = [0, 0, 99, 99, 99]
    rows = [DecodeRow(10 + i, 5 + i, [i, 50 + i]) for i in range(6)]
    assert graphs.run(rows[:5]).tolist() == [[10 + i, 5 + i, i, 50 + i, 99] for i in range(5)]
    assert replays[-1][5:].tolist() == [idle]
    # Rows used by the previous step and not by this one are idle again.
    assert graphs.run(rows[2:5]).tolist() == [[10 + i, 5 + i, i, 50 + i, 99] for i in range(2, 5)]
    assert replays[-1][3:].tolist() == [idle]
    tokens, positions, table = unpack_sheet(replays[-1])
    assert (tokens[0], positions[0], table[0].tolist()) == (12, 7, [2, 52, 99])


@torch.inference_mode()
@pytest.mark.parametrize("num_rows", [1, 2, 3, 5])
def test_a_recorded_step_computes_and_caches_the_same(fused: LanguageSide, num_rows: int) -> None:
    backend = RerunBackend()
    states = [state_of(make_request(f"{i}", seed=i, num_images=1 + i % 2), [i, 5 + i, 10 + i]) for i in range(num_rows)]
    found = []
    for runner in (ModelRunner(fused, ReferenceBackend(), 15, 16), ModelRunner(fused, backend, 15, 16, max_recorded=5)):
        for pages in (*runner.cache.keys, *runner.cache.values):
            pages[:15] = torch.nan
        for state in states:
            state.tokens = list(state.request.prompt_ids)
            runner.run([Chunk(state, 0, len(state.tokens))])
        for state in states:
            state.tokens.append(7)
        found.append((runner.run([Chunk(state, len(state.tokens) - 1, 1) for state in states]).clone(), runner.cache))
    assert backend.replayed == [min(size for size in (1, 2, 4, 5) if size >= num_rows)]
    (plain, plain_cache), (recorded, recorded_cache) = found
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(recorded_cache.keys, plain_cache.keys, strict=True):
        # There is one spare block more; all others are identical, even where nothing was ever written.
        torch.testing.assert_close(ours[:15], theirs, equal_nan=True, atol=1e-5, rtol=1e-5)


def engine_with(side: LanguageSide, checkpoint: Path, backend: ReferenceBackend, **limits: object) -> Engine:
    return Engine(side, load_tokenizer(checkpoint), EngineConfig(**limits), backend=backend)


def test_answers_are_the_same_with_arrivals_and_preemptions(fused: LanguageSide, tiny_checkpoint: Path) -> None:
    requests = [make_request(f"{i}", seed=i, num_images=i % 3, max_tokens=5 + 7 * (i % 5)) for i in range(12)]
    limits = {"max_running": 7, "max_step_tokens": 64, "prefill_chunk": 16, "cache_tokens": 160, "block_size": 4}
    backend = RerunBackend()
    engine = engine_with(fused, tiny_checkpoint, backend, **limits)
    answers = run(engine, *requests)
    assert answers == run(engine_with(fused, tiny_checkpoint, ReferenceBackend(), **limits), *requests)
    assert engine.stats.num_preemptions > 0
    assert backend.recorded == [7, 4, 2, 1]
    assert set(backend.replayed) == {1, 4, 7}
    assert engine.pool.num_blocks == 40, "the block of rows left over is nobody else's"


def test_single_token_prefill_and_scores_are_not_replayed(fused: LanguageSide, tiny_checkpoint: Path) -> None:
    backend = RerunBackend()
    engine = engine_with(fused, tiny_checkpoint, backend, prefill_chunk=1, max_step_tokens=2, max_running=1)
    scored = replace(make_request("scored", num_images=1), score_from=14)
    engine.add_request(scored)
    while engine.has_work:
        engine.step()
    assert not backend.replayed
    run(engine, make_request("a", seed=3, num_images=1, max_tokens=4))
    # The prompt's last token needs logits, as an answer's tokens do, so it is replayed too.
    assert backend.replayed == [1] * 4


def test_steps_that_cannot_be_recorded_run_directly(language_side: LanguageSide, tiny_checkpoint: Path) -> None:
    """Applies to modules that are not ours and to engines with graphs disabled."""
    ours = copy.deepcopy(language_side)
    ready_language(ours)
    request = make_request("a")
    answers = []
    for side, decode_graphs in ((language_side, True), (ours, False)):
        backend = RerunBackend()
        answers.append(run(engine_with(side, tiny_checkpoint, backend, decode_graphs=decode_graphs), request))
        assert not backend.recorded
    assert answers[0] == answers[1]
