"""Decoders in 8 and 4 bits: the engine's tokens equal those of transformers' generate with the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.models.fused import ready_language
from llava_core.models.language import LanguageSide
from llava_core.models.quantize import quantize
from tests.llava_core.engine.conftest import make_request
from tests.llava_core.engine.test_engine import generate_with_transformers, run

# An NF4 block holds 64 values, so rows must be multiples of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
REQUESTS = [make_request(f"{i}", seed=i, num_images=i % 3, max_tokens=6 + 5 * (i % 4)) for i in range(9)]


@pytest.fixture(scope="module", params=["Llama", "Mistral, sliding window"])
def plain(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> LanguageSide:
    config = open_checkpoint(tiny_checkpoint).config
    kind = {} if request.param == "Llama" else {"model_type": "mistral", "sliding_window": 9}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return LanguageSide(replace(config, text={**config.text, **SIZES, **kind}, hidden_size=64)).eval()


@pytest.fixture(scope="module", params=["8bit", "4bit"])
def quantized(request: pytest.FixtureRequest, plain: LanguageSide) -> LanguageSide:
    side = LanguageSide(replace(plain.config, text=plain.config.text)).eval()
    side.load_state_dict(plain.state_dict())
    quantize(side.decoder, request.param, device="cpu", dtype=torch.float32)
    # As a service does; quantised layers are left unchanged.
    ready_language(side)
    return side


@pytest.fixture(scope="module")
def expected(quantized: LanguageSide) -> dict[str, list[int]]:
    return {request.request_id: generate_with_transformers(quantized, request) for request in REQUESTS}


@torch.inference_mode()
def check(answers: dict[str, list[int]], side: LanguageSide, expected: dict[str, list[int]]) -> None:
    """Checks answers against transformers. In 4 bits tokens must be identical. In 8 bits inputs are rounded to 255
    steps, and the last bit of a float may decide between two of them: even transformers' own cached and uncached
    answers differ now and then. Each token must then be the likeliest, or nearly so, by transformers' logits of the
    whole text."""
    is_8bit = any(type(module).__name__ == "Linear8bitLt" for module in side.modules())
    if not is_8bit:
        assert answers == expected
        return
    for request in REQUESTS:
        answer, start = answers[request.request_id], len(request.prompt_ids)
        assert len(answer) == len(expected[request.request_id])
        ids = torch.tensor([[*request.prompt_ids, *answer]])
        logits = side(ids, [image.features for image in request.features])[0, start - 1 : -1]
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert behind.max() < 0.05 * logits.std(), request.request_id
    same = [request for request in REQUESTS if answers[request.request_id] == expected[request.request_id]]
    assert len(same) >= len(REQUESTS) - 2


def test_requests_one_at_a_time(quantized: LanguageSide, expected: dict[str, list[int]], tiny_checkpoint: Path) -> None:
    engine = Engine(quantized, load_tokenizer(tiny_checkpoint))
    answers: dict[str, list[int]] = {}
    for request in REQUESTS:
        answers |= run(engine, request)
    check(answers, quantized, expected)


@pytest.mark.parametrize("prefill_chunk", [5, 64])
def test_batched_requests_with_chunked_prefill_and_preemption(
    quantized: LanguageSide, expected: dict[str, list[int]], tiny_checkpoint: Path, prefill_chunk: int
) -> None:
    limits = EngineConfig(max_running=6, prefill_chunk=prefill_chunk, max_step_tokens=70, block_size=4, cache_tokens=56)
    engine = Engine(quantized, load_tokenizer(tiny_checkpoint), limits)
    check(run(engine, *REQUESTS), quantized, expected)
    assert engine.stats.num_preemptions > 0


def test_quantised_answers_differ_from_unquantised_ones(
    plain: LanguageSide, expected: dict[str, list[int]], tiny_checkpoint: Path
) -> None:
    """Otherwise nothing was quantised, or the tests above could not see a difference."""
    assert run(Engine(plain, load_tokenizer(tiny_checkpoint)), *REQUESTS) != expected
