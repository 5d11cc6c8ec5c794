"""Random mixes of requests for every decoder: each answer equals transformers' generate, whatever else is running."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.attention import Backend
from llava_core.engine.attention_cpu import CpuBackend
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from llava_core.types import EngineRequest, TokenDelta
from tests.llava_core.engine.conftest import make_request
from tests.llava_core.engine.rerun import RerunBackend
from tests.llava_core.engine.test_engine import generate_with_transformers

DECODERS = {
    "Llama, grouped heads": {},
    "Llama, plain heads, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "Llama, one head for all, scaled positions": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    },
    "Mistral": {"model_type": "mistral", "sliding_window": None},
    "Mistral, sliding window": {"model_type": "mistral", "sliding_window": 9},
}


@pytest.fixture(scope="module", params=DECODERS)
def side(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> LanguageSide:
    config = open_checkpoint(tiny_checkpoint).config
    tied = DECODERS[request.param].get("tie_word_embeddings", False)
    text = {**config.text, **DECODERS[request.param]}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LanguageSide(replace(config, text=text, tie_word_embeddings=tied)).eval()


Served = tuple[LanguageSide, Backend]


@pytest.fixture(scope="module", params=["fused", "recorded", "modules"])
def served(request: pytest.FixtureRequest, side: LanguageSide) -> Served:
    if request.param == "modules":
        return side, CpuBackend()
    fused = copy.deepcopy(side)
    ready_language(fused)
    return fused, RerunBackend() if request.param == "recorded" else CpuBackend()


@pytest.fixture(scope="module")
def expected(side: LanguageSide) -> Callable[[int], list[int]]:
    return cache(lambda kind: generate_with_transformers(side, request_of("a", kind)))


def request_of(name: str, kind: int) -> EngineRequest:
    """Makes one of twelve requests; those of equal `kind % 3` share their beginning and first picture."""
    own, shared = make_request(name, seed=kind, num_images=kind % 4), make_request(name, seed=kind % 3, num_images=1)
    ids = [*shared.prompt_ids, *own.prompt_ids]
    made = replace(own, prompt_ids=ids, features=[*shared.features, *own.features])
    length = 3 + 5 * (kind % 5)
    # Like generate(), allow no end token before min_tokens.
    sampling = replace(made.sampling, max_tokens=length, min_tokens=length, ignore_eos=False)
    return replace(made, sampling=sampling)


Arrivals = list[tuple[int, int, int | None]]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 20).map(lambda step: step if step < 15 else 0),
            st.integers(0, 11),
            st.one_of(st.none(), st.none(), st.integers(0, 12)),
        ),
        min_size=1,
        max_size=32,
    ),
    max_running=st.integers(1, 12),
    prefill_chunk=st.sampled_from([1, 5, 64]),
    block_size=st.sampled_from([1, 4, 16]),
    cache_tokens=st.sampled_from([80, 150, 4000]),
)
def test_every_answer_of_a_random_mix_equals_transformers(
    served: Served,
    expected: Callable[[int], list[int]],
    tiny_checkpoint: Path,
    arrivals: Arrivals,
    max_running: int,
    prefill_chunk: int,
    block_size: int,
    cache_tokens: int,
) -> None:
    """`arrivals`: the step at which a request arrives, its kind, and after how many steps its client disconnects."""
    config = EngineConfig(
        max_running=max_running,
        prefill_chunk=prefill_chunk,
        max_step_tokens=max_running + prefill_chunk,
        block_size=block_size,
        cache_tokens=cache_tokens,
    )
    engine = Engine(served[0], load_tokenizer(tiny_checkpoint), config, backend=served[1])
    answers: dict[str, list[int]] = {}
    leaving = {f"{i}": came + left for i, (came, _, left) in enumerate(arrivals) if left is not None}
    step = 0
    while step <= max(came for came, _, _ in arrivals) or engine.has_work:
        for i, (came, kind, _) in enumerate(arrivals):
            if came == step:
                engine.add_request(request_of(f"{i}", kind))
        for name in [name for name, when in leaving.items() if when == step]:
            engine.abort(name)
        for output in engine.step():
            assert isinstance(output, TokenDelta), output
            answers.setdefault(output.request_id, []).extend(output.token_ids)
        engine.pool.check_integrity()
        step += 1
        assert step < 3000, "it does not come to an end"
    assert engine.pool.num_used == 0
    for i, (_, kind, left) in enumerate(arrivals):
        tokens = answers.get(f"{i}", [])
        assert tokens == (expected(kind)[: len(tokens)] if left is not None else expected(kind)), f"request {i}"
