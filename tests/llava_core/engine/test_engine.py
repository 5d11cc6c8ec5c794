"""The engine: equal to transformers' generate, independent of neighbours, failures and aborts that stay alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.engine.request import RequestFailure
from llava_core.errors import EngineError, OverloadedError, PromptTooLongError
from llava_core.models.language import LanguageSide
from llava_core.types import EngineRequest, TokenDelta
from tests.llava_core.engine.conftest import make_request
from tests.tiny import CONTEXT_LENGTH

BuildEngine = Callable[..., Engine]


def run(engine: Engine, *requests: EngineRequest) -> dict[str, list[int]]:
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            assert isinstance(output, TokenDelta), output
            tokens[output.request_id] += output.token_ids
    return tokens


@torch.inference_mode()
def generate_with_transformers(side: LanguageSide, request: EngineRequest) -> list[int]:
    embeddings = side.embed(torch.tensor([request.prompt_ids]), [image.features for image in request.features])
    ids = side.decoder.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
        max_new_tokens=request.sampling.max_tokens,
        min_new_tokens=request.sampling.max_tokens,
        do_sample=False,
    )
    return ids[0].tolist()


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_greedy_tokens_equal_transformers_generate(
    build_engine: BuildEngine, language_side: LanguageSide, num_images: int
) -> None:
    request = make_request("a", seed=4, num_images=num_images)
    # generate() bans the end token below min_new_tokens; do without it here as well.
    expected = generate_with_transformers(language_side, request)
    assert 2 not in run(build_engine(), request)["a"], "choose another seed: this answer holds an end token"
    assert run(build_engine(), request)["a"] == expected


def test_what_a_request_produces_does_not_depend_on_its_neighbours(build_engine: BuildEngine) -> None:
    def request(i: int) -> EngineRequest:
        plain = make_request(f"r{i}", seed=i, num_images=i % 3)
        return replace(plain, sampling=replace(plain.sampling, max_tokens=4 + i, temperature=0.9 * (i % 2), seed=i))

    requests = [request(i) for i in range(6)]
    alone = {name: ids for request in requests for name, ids in run(build_engine(), request).items()}
    assert run(build_engine(max_running=3), *requests) == alone


def test_the_last_delta_carries_reason_usage_and_times(build_engine: BuildEngine) -> None:
    engine = build_engine()
    engine.add_request(make_request("a", num_images=2, max_tokens=3))
    outputs = [output for _ in range(3) for output in engine.step()]
    last = outputs[-1]
    assert isinstance(last, TokenDelta)
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.image_tokens) == (21, 3, 8)
    assert set(last.stage_ms) == {"queue", "prefill", "decode"}
    assert all(value >= 0 for value in last.stage_ms.values())
    assert not engine.has_work


def test_a_stop_string_ends_the_answer_before_itself(build_engine: BuildEngine) -> None:
    def text(stop: tuple[str, ...]) -> tuple[str, str | None]:
        engine = build_engine()
        request = make_request("a", seed=5, max_tokens=30)
        engine.add_request(replace(request, sampling=replace(request.sampling, stop=stop)))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        return "".join(delta.text for delta in deltas), deltas[-1].finish_reason

    full, reason = text(())
    assert reason == "length"
    mark = full[5:7]
    assert text((mark,)) == (full[: full.index(mark)], "stop")


def test_an_abort_takes_effect_at_the_next_step_wherever_the_request_is(build_engine: BuildEngine) -> None:
    engine = build_engine(max_running=1)
    engine.add_request(make_request("running", max_tokens=100))
    engine.add_request(make_request("waiting", seed=1))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    engine.abort("waiting")
    engine.abort("running")
    engine.abort("never there")
    assert engine.step() == []
    assert not engine.has_work


def test_poisoned_features_fail_alone(build_engine: BuildEngine) -> None:
    poisoned = make_request("bad", seed=1)
    poisoned.features[0].features[0, 0] = float("nan")
    healthy = make_request("good", seed=2)
    expected = run(build_engine(), healthy)["good"]
    engine = build_engine()
    engine.add_request(poisoned)
    engine.add_request(healthy)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    failures = [output for output in outputs if isinstance(output, RequestFailure)]
    assert [failure.request_id for failure in failures] == ["bad"]
    assert isinstance(failures[0].error, EngineError)
    tokens = [token for output in outputs if isinstance(output, TokenDelta) for token in output.token_ids]
    assert tokens == expected


def test_a_token_beyond_the_embeddings_fails_alone(build_engine: BuildEngine, caplog: pytest.LogCaptureFixture) -> None:
    engine = build_engine()
    good = make_request("good", max_tokens=3)
    bad = make_request("bad", max_tokens=3)
    engine.add_request(replace(bad, prompt_ids=(*bad.prompt_ids, 100_000)))
    engine.add_request(good)
    outputs = [output for _ in range(4) for output in engine.step()]
    (failure,) = (output for output in outputs if isinstance(output, RequestFailure))
    assert failure.request_id == "bad"
    assert isinstance(failure.error, EngineError)
    assert "IndexError" in caplog.text
    tokens = [token for output in outputs if isinstance(output, TokenDelta) for token in output.token_ids]
    assert tokens == run(build_engine(), good)["good"]


def test_features_that_do_not_match_the_placeholders_fail_alone(build_engine: BuildEngine) -> None:
    engine = build_engine()
    engine.add_request(replace(make_request("bad"), features=()))
    (failure,) = engine.step()
    assert isinstance(failure, RequestFailure)
    assert "4 image placeholders but 0 feature rows" in str(failure.error)


def test_what_cannot_fit_is_refused_with_all_numbers(build_engine: BuildEngine) -> None:
    with pytest.raises(PromptTooLongError, match=f"9999.*{CONTEXT_LENGTH}"):
        build_engine().add_request(make_request("a", max_tokens=9999))


def test_a_full_queue_refuses_and_an_id_in_use_is_an_error(build_engine: BuildEngine) -> None:
    engine = build_engine(max_waiting=1)
    engine.add_request(make_request("a"))
    with pytest.raises(ValueError, match="in use"):
        engine.add_request(make_request("a"))
    with pytest.raises(OverloadedError):
        engine.add_request(make_request("b"))


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_running"):
        EngineConfig(max_running=0)
