"""The runner: chunked prompts give the logits of whole ones, and the cache is as large as configured or as fits."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llava_core.engine.attention_cpu import CpuBackend
from llava_core.engine.attention_cuda import CudaBackend
from llava_core.engine.config import EngineConfig
from llava_core.engine.prefix import ImageSpan
from llava_core.engine.request import RequestState
from llava_core.engine.runner import ModelRunner, cache_tokens, choose_backend, wanted
from llava_core.engine.scheduler import Chunk
from llava_core.errors import EngineError
from llava_core.models.language import LanguageSide
from llava_core.types import EngineRequest
from tests.llava_core.engine.conftest import make_request
from tests.tiny import CONTEXT_LENGTH, IMAGE_TOKENS


def state_of(request: EngineRequest, blocks: list[int]) -> RequestState:
    first = request.prompt_ids.index(-200)
    spans = [
        ImageSpan(first + number * IMAGE_TOKENS, first + (number + 1) * IMAGE_TOKENS, image.digest, image.size)
        for number, image in enumerate(request.features)
    ]
    state = RequestState(request, 0, 0, 5, 0, tuple(spans), SimpleNamespace(), list(request.prompt_ids))  # type: ignore[arg-type]
    state.blocks = blocks
    return state


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 3, 7, 100])
def test_a_chunked_prompt_has_the_logits_of_the_whole(language_side: LanguageSide, length: int) -> None:
    """Two requests share the batch; chunk boundaries fall inside pictures."""
    requests = [make_request("a", num_images=2), make_request("b", seed=1, num_images=1)]
    states = [state_of(requests[0], [5, 0, 3, 7, 1, 9]), state_of(requests[1], [2, 8, 6, 4, 11])]
    runner = ModelRunner(language_side, CpuBackend(), 12, 4)
    found: dict[str, torch.Tensor] = {}
    for start in range(0, max(len(state.tokens) for state in states), length):
        chunks = [
            Chunk(state, start, min(length, len(state.tokens) - start)) for state in states if start < len(state.tokens)
        ]
        rows = runner.run(chunks).split([len(wanted(chunk)) for chunk in chunks])
        found |= {chunk.state.request_id: row[0] for chunk, row in zip(chunks, rows, strict=True) if len(row)}
    assert all(not state.image_rows for state in states), "projected rows are kept no longer than needed"
    for request in requests:
        features = [image.features for image in request.features]
        expected = language_side(torch.tensor([request.prompt_ids]), features)[0, -1]
        torch.testing.assert_close(found[request.request_id], expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_only_scored_tokens_and_the_last_one_have_logits() -> None:
    state = state_of(make_request("a"), [0])
    num = len(state.tokens)
    assert wanted(Chunk(state, 0, num - 1)) == range(0)
    assert wanted(Chunk(state, 3, num - 3)) == range(num - 1, num)
    scored = state_of(replace(make_request("a"), score_from=14), [0])
    assert [place for start in range(0, num, 5) for place in wanted(Chunk(scored, start, min(5, num - start)))] == [
        *range(13, num - 1)
    ]


def test_the_models_attention_is_restored_after_an_error(language_side: LanguageSide) -> None:
    before = language_side.decoder.config._attn_implementation
    runner = ModelRunner(language_side, CpuBackend(), 12, 4)
    state = state_of(make_request("a"), [0, 1, 2, 3, 99])
    with pytest.raises((IndexError, RuntimeError)):
        runner.run([Chunk(state, 0, len(state.tokens))])
    assert language_side.decoder.config._attn_implementation == before


def test_rope_frequencies_that_depend_on_the_batch_are_refused(
    language_side: LanguageSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(language_side.decoder.config.rope_parameters, "rope_type", "dynamic")
    with pytest.raises(EngineError, match="dynamic"):
        ModelRunner(language_side, CpuBackend(), 4, 4)


def test_the_cache_is_as_large_as_configured_useful_or_possible(
    language_side: LanguageSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CpuBackend()
    assert cache_tokens(language_side, EngineConfig(cache_tokens=77), backend) == 77
    assert cache_tokens(language_side, EngineConfig(max_running=3), backend) == 3 * CONTEXT_LENGTH
    # Two layers, two heads of eight numbers, keys and values, four bytes each.
    per_token = 2 * 2 * 2 * 8 * 4
    monkeypatch.setattr("llava_core.engine.runner.available_bytes", lambda _: 1000 * per_token)
    assert cache_tokens(language_side, EngineConfig(max_running=3), backend) == 400


def test_the_device_decides_the_backend(language_side: LanguageSide) -> None:
    assert isinstance(choose_backend(language_side), CpuBackend)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert isinstance(choose_backend(on_gpu), CudaBackend)  # type: ignore[arg-type]
