"""The engine: answers equal transformers' generate, neighbours do not matter, failures and aborts stay isolated."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine, StepOutput
from llava_core.engine.request import RequestFailure
from llava_core.engine.scheduler import Chunk
from llava_core.errors import EngineError, OverloadedError, PromptTooLongError, RequestError
from llava_core.models.language import LanguageSide
from llava_core.types import BegunAnswer, EngineRequest, SamplingParams, TokenDelta
from tests.llava_core.engine.conftest import make_request
from tests.tiny import CONTEXT_LENGTH

BuildEngine = Callable[..., Engine]


def collect(engine: Engine, *requests: EngineRequest) -> list[StepOutput]:
    """Runs these requests to the end and returns all outputs; checks the cache's integrity after every step."""
    for request in requests:
        engine.add_request(request)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.pool.check_integrity()
    assert engine.pool.num_used == 0
    return outputs


def tokens_of(outputs: list[StepOutput], name: str, index: int = 0) -> list[int]:
    """Returns the tokens of one answer."""
    deltas = [output for output in outputs if isinstance(output, TokenDelta)]
    return [t for delta in deltas if (delta.request_id, delta.index) == (name, index) for t in delta.token_ids]


def last_of(outputs: list[StepOutput]) -> TokenDelta:
    """Returns the last delta of the only request."""
    assert isinstance(outputs[-1], TokenDelta)
    assert outputs[-1].usage is not None
    return outputs[-1]


def run(engine: Engine, *requests: EngineRequest) -> dict[str, list[int]]:
    outputs = collect(engine, *requests)
    assert all(isinstance(output, TokenDelta) for output in outputs), outputs
    return {request.request_id: tokens_of(outputs, request.request_id) for request in requests}


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
    # generate() bans the end token below min_new_tokens, so it must not occur here either.
    expected = generate_with_transformers(language_side, request)
    assert 2 not in run(build_engine(), request)["a"], "choose another seed: this answer holds an end token"
    assert run(build_engine(), request)["a"] == expected


def test_an_answer_does_not_depend_on_its_neighbours(build_engine: BuildEngine) -> None:
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


def test_an_answer_ends_before_a_stop_string(build_engine: BuildEngine) -> None:
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


def test_aborts_take_effect_at_the_next_step_in_any_state(build_engine: BuildEngine) -> None:
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


def test_a_bad_request_is_refused_before_it_costs_anything(build_engine: BuildEngine) -> None:
    engine = build_engine()
    poisoned = make_request("bad", seed=1)
    poisoned.features[0].features[0, 0] = float("nan")
    good = make_request("good")
    for request, error, cause in [
        (poisoned, EngineError, "not finite"),
        (replace(good, features=()), EngineError, "4 image placeholders but 0 feature rows"),
        (replace(good, prompt_ids=(*good.prompt_ids, 100_000)), RequestError, "token 100000 does not exist"),
    ]:
        with pytest.raises(error, match=cause):
            engine.add_request(request)
    assert not engine.has_work
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("when", [0, 3])
def test_a_request_that_fails_in_the_model_does_not_affect_others(
    build_engine: BuildEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: int
) -> None:
    requests = [make_request(f"r{i}", seed=i) for i in range(3)]
    expected = run(build_engine(), *requests)
    engine = build_engine(prefill_chunk=5)
    whole = engine._runner.run

    def explode(chunks: list[Chunk]) -> torch.Tensor:
        if any(chunk.state.request_id == "r1" and chunk.state.num_output == when for chunk in chunks):
            raise RuntimeError("this one")
        return whole(chunks)

    monkeypatch.setattr(engine._runner, "run", explode)
    outputs = collect(engine, *requests)
    (failure,) = (output for output in outputs if isinstance(output, RequestFailure))
    assert failure.request_id == "r1"
    assert "this one" in str(failure.error)
    assert "this one" in caplog.text
    for name in ("r0", "r2"):
        assert tokens_of(outputs, name) == expected[name]
    assert engine.pool.num_used == 0


def test_nan_logits_fail_one_request_and_its_blocks_are_not_reused(
    build_engine: BuildEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [make_request(f"r{i}", seed=i) for i in range(2)]
    expected = run(build_engine(), *requests)
    engine = build_engine()
    whole = engine._runner.run

    def poison(chunks: list[Chunk]) -> torch.Tensor:
        logits = whole(chunks).clone()
        for row, chunk in enumerate(chunks):
            if chunk.state.request_id == "r1" and chunk.state.num_output == 4:
                logits[row, 7] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", poison)
        outputs = collect(engine, *requests)
    assert [output.request_id for output in outputs if isinstance(output, RequestFailure)] == ["r1"]
    assert tokens_of(outputs, "r0") == expected["r0"]
    again = collect(engine, requests[1])
    assert tokens_of(again, "r1") == expected["r1"]
    assert last_of(again).usage.cached_tokens == 0
    assert last_of(collect(engine, requests[0])).usage.cached_tokens > 0


def test_a_request_that_cannot_fit_is_refused_with_all_numbers(build_engine: BuildEngine) -> None:
    with pytest.raises(PromptTooLongError, match=f"9999.*{CONTEXT_LENGTH}"):
        build_engine().add_request(make_request("a", max_tokens=9999))


def test_a_full_queue_and_an_id_in_use_are_refused(build_engine: BuildEngine) -> None:
    engine = build_engine(max_running=1, max_waiting=0)
    engine.add_request(make_request("a"))
    with pytest.raises(ValueError, match="in use"):
        engine.add_request(make_request("a"))
    with pytest.raises(OverloadedError):
        engine.add_request(make_request("b"))


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_running"):
        EngineConfig(max_running=0)


@pytest.mark.parametrize("offset", range(17))
def test_a_cached_picture_is_reused_and_never_confused_with_another(build_engine: BuildEngine, offset: int) -> None:
    """Tried at every offset of the picture within a block."""

    def request(name: str, picture: int) -> EngineRequest:
        made = make_request(name, num_images=2)
        other = make_request(name, seed=picture, num_images=2)
        ids = [*range(10, 10 + offset), *made.prompt_ids]
        return replace(made, prompt_ids=ids, features=[made.features[0], other.features[1]])

    alone = {f"{i}": run(build_engine(block_size=4), request(f"{i}", i))[f"{i}"] for i in range(3)}
    engine = build_engine(block_size=4)
    for name in ("0", "1", "2", "0", "1"):
        before = engine.stats.computed_tokens
        outputs = collect(engine, request(name, int(name)))
        assert tokens_of(outputs, name) == alone[name]
        usage = last_of(outputs).usage
        assert usage is not None
        assert engine.stats.computed_tokens - before == usage.prompt_tokens - usage.cached_tokens + 11
    # The second time all but a partial block and the last token, which must be computed, comes from the cache.
    assert usage.cached_tokens == (usage.prompt_tokens - 1) // 4 * 4
    assert len({tuple(tokens) for tokens in alone.values()}) == 3


def test_concurrent_requests_prefill_a_shared_prefix_once(build_engine: BuildEngine) -> None:
    requests = [replace(make_request("r", num_images=2), request_id=f"r{i}") for i in range(5)]
    alone = run(build_engine(), requests[0])["r0"]
    engine = build_engine(block_size=4)
    assert list(run(engine, *requests).values()) == [alone] * 5
    num_prompt = len(requests[0].prompt_ids)
    assert engine.stats.computed_tokens <= num_prompt + 4 * 4 + 5 * 11


@pytest.mark.parametrize("prefill_chunk", [1, 3, 7])
def test_decoding_continues_during_chunked_prefill(build_engine: BuildEngine, prefill_chunk: int) -> None:
    first, second = make_request("first", max_tokens=40), make_request("second", seed=1, num_images=3)
    alone = {**run(build_engine(), first), **run(build_engine(), second)}
    engine = build_engine(prefill_chunk=prefill_chunk, block_size=3)
    engine.add_request(first)
    outputs = engine.step()
    engine.add_request(second)
    while engine.num_running:
        step = engine.step()
        assert any(output.request_id == "first" for output in step) or len(tokens_of(outputs, "first")) == 40
        outputs += step
    assert {name: tokens_of(outputs, name) for name in alone} == alone


def test_preempted_requests_lose_nothing(build_engine: BuildEngine) -> None:
    requests = [make_request(f"r{i}", seed=i, num_images=i % 3, max_tokens=30) for i in range(5)]
    alone = {name: ids for request in requests for name, ids in run(build_engine(), request).items()}
    engine = build_engine(block_size=4, cache_tokens=100)
    assert run(engine, *requests) == alone
    assert engine.stats.num_preemptions > 0


def test_the_lower_priority_number_is_served_first(build_engine: BuildEngine) -> None:
    requests = [replace(make_request(f"r{i}", seed=i), priority=-i) for i in range(4)]
    outputs = collect(build_engine(max_running=1), *requests)
    ended = [output.request_id for output in outputs if isinstance(output, TokenDelta) and output.finish_reason]
    assert ended == ["r3", "r2", "r1", "r0"]


def deltas_of(outputs: list[StepOutput], index: int = 0) -> list[TokenDelta]:
    return [output for output in outputs if isinstance(output, TokenDelta) and output.index == index]


def begun_by(outputs: list[StepOutput], num_answers: int) -> list[BegunAnswer]:
    """Returns the state of each answer as known to the receiver of these outputs."""
    answers = [deltas_of(outputs, index) for index in range(num_answers)]
    return [
        BegunAnswer(
            [token for delta in deltas for token in delta.token_ids],
            is_over=any(delta.finish_reason is not None for delta in deltas),
        )
        for deltas in answers
    ]


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.8, "seed": 5, "n": 3},
    {"min_tokens": 9, "stop_token_ids": tuple(range(5, 60))},
    {"temperature": 1.5, "seed": 6, "stop_token_ids": tuple(range(5, 30)), "n": 4},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("num_images", [0, 1])
def test_an_answer_interrupted_anywhere_resumes_unchanged(
    build_engine: BuildEngine, sampling: dict[str, Any], num_images: int
) -> None:
    plain = make_request("a", num_images=num_images, logprobs=2)
    request = replace(plain, sampling=replace(plain.sampling, **sampling))
    n = request.sampling.n
    whole = collect(build_engine(), request)
    *_, last = [place for place, delta in enumerate(whole) if isinstance(delta, TokenDelta) and delta.finish_reason]
    for cut in range(1, last + 1):
        sent = whole[:cut]
        rest = collect(build_engine(), replace(request, begun=begun_by(sent, n)))
        for index in range(n):
            before, again, expected = deltas_of(sent, index), deltas_of(rest, index), deltas_of(whole, index)
            both = before + again
            assert [token for delta in both for token in delta.token_ids] == tokens_of(whole, "a", index)
            assert "".join(delta.text for delta in both) == "".join(delta.text for delta in expected)
            assert [delta.finish_reason for delta in both if delta.finish_reason] == [expected[-1].finish_reason]
            # Cache hits from other answers do not count as part of the answer.
            usages = [replace(delta.usage, cached_tokens=0) for delta in (both[-1], expected[-1]) if delta.usage]
            assert len(usages) == 2
            assert usages[0] == usages[1]
            found = [each for delta in both for each in delta.logprobs]
            logprobs = [each for delta in expected for each in delta.logprobs]
            assert [each.token for each in found] == [each.token for each in logprobs]
            assert [each.logprob for each in found] == pytest.approx([each.logprob for each in logprobs], abs=1e-4)


def test_held_back_text_is_sent_on_resuming(build_engine: BuildEngine) -> None:
    """A stop string that straddles the cut is found, and text that only resembled the start of one is not lost."""
    plain = make_request("a", max_tokens=20)
    text = "".join(delta.text for delta in deltas_of(collect(build_engine(), plain)))
    for stop in (text[6:14], f"{text[4:12]}\0", f"{text[-4:]}\0"):
        request = replace(plain, sampling=replace(plain.sampling, stop=(stop,)))
        whole = deltas_of(collect(build_engine(), request))
        expected = "".join(delta.text for delta in whole)
        assert expected == text.partition(stop)[0]
        for cut in range(1, len(whole)):
            rest = deltas_of(collect(build_engine(), replace(request, begun=begun_by([*whole[:cut]], 1))))
            assert "".join(delta.text for delta in (*whole[:cut], *rest)) == expected
            assert rest[-1].finish_reason == whole[-1].finish_reason
            assert rest[-1].usage == whole[-1].usage


def test_resuming_a_complete_answer_ends_at_once(build_engine: BuildEngine) -> None:
    request = make_request("a")
    whole = collect(build_engine(), request)
    [end] = deltas_of(collect(build_engine(), replace(request, begun=[BegunAnswer(tokens_of(whole, "a"))])))
    assert (end.token_ids, end.finish_reason, end.usage) == ((), "length", last_of(whole).usage)


def test_a_resumed_request_is_accepted_when_the_queue_is_full(build_engine: BuildEngine) -> None:
    engine = build_engine(max_running=1, max_waiting=0)
    request = make_request("a")
    engine.add_request(request)
    with pytest.raises(OverloadedError):
        engine.add_request(replace(request, request_id="b"))
    engine.add_request(replace(request, request_id="c", begun=[BegunAnswer([8])]))
    assert len(tokens_of(collect(engine), "c")) == request.sampling.max_tokens - 1  # type: ignore[operator]


def test_several_answers_share_the_prefill_and_follow_their_seed(build_engine: BuildEngine) -> None:
    plain = make_request("a")
    request = replace(plain, sampling=replace(plain.sampling, n=4, temperature=1.0, seed=9))
    engine = build_engine(block_size=4)
    outputs = collect(engine, request, make_request("b", seed=7))
    answers = [tokens_of(outputs, "a", index) for index in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4
    single = collect(build_engine(), replace(request, sampling=replace(request.sampling, n=1)))
    assert tokens_of(single, "a") == answers[0]
    assert engine.stats.cached_tokens >= 3 * ((len(request.prompt_ids) - 1) // 4 * 4)


@torch.inference_mode()
def test_log_probabilities_equal_the_models(build_engine: BuildEngine, language_side: LanguageSide) -> None:
    request = make_request("a", num_images=1, logprobs=3, max_tokens=6)
    outputs = collect(build_engine(), request)
    answer = tokens_of(outputs, "a")
    ids = torch.tensor([[*request.prompt_ids, *answer]])
    expected = language_side(ids, [image.features for image in request.features])[0].log_softmax(-1)
    start = len(request.prompt_ids) - 1
    found = [logprob for delta in outputs if isinstance(delta, TokenDelta) for logprob in delta.logprobs]
    assert [each.token for each in found] == answer
    for place, each in enumerate(found, start):
        assert each.logprob == pytest.approx(float(expected[place, each.token]), abs=1e-4)
        top = expected[place].topk(3)
        assert [token for token, _ in each.top] == top.indices.tolist()
    # The same tokens scored as a prompt, with chunked prefill and, the second time, with cached blocks.
    scored = EngineRequest("s", ids[0].tolist(), request.features, SamplingParams(logprobs=3), score_from=start + 1)
    engine = build_engine(max_running=16, prefill_chunk=4, max_step_tokens=20, block_size=4)
    for _ in range(2):
        last = last_of(collect(engine, scored))
        assert [each.token for each in last.logprobs] == answer
        assert [each.logprob for each in last.logprobs] == pytest.approx([each.logprob for each in found], abs=1e-4)
    assert last.usage is not None
    assert last.usage.cached_tokens > 0


def test_stop_token_ids_end_an_answer_but_not_before_min_tokens(build_engine: BuildEngine) -> None:
    tokens = run(build_engine(), make_request("a", max_tokens=20))["a"]
    stop = next(token for place, token in enumerate(tokens) if place >= 4 and token not in tokens[:place])
    ended = collect(build_engine(), make_request("a", max_tokens=20, stop_token_ids=(stop,)))
    assert tokens_of(ended, "a") == tokens[: tokens.index(stop) + 1]
    assert last_of(ended).finish_reason == "stop"
    longer = run(build_engine(), make_request("a", max_tokens=20, stop_token_ids=(stop,), min_tokens=15))["a"]
    assert len(longer) >= 15
    assert stop not in longer[:15]


def test_a_preempted_score_has_each_logprob_once(build_engine: BuildEngine) -> None:
    ids = [1, *range(5, 64)]
    writers = [
        EngineRequest(f"w{first}", [1, first], (), SamplingParams(max_tokens=60, ignore_eos=True)) for first in (50, 70)
    ]
    scored = EngineRequest("scored", ids, (), SamplingParams(logprobs=0), score_from=1, priority=1)
    engine = build_engine(block_size=4, cache_tokens=108, max_running=3, max_step_tokens=16, prefill_chunk=2)
    for request in (*writers, scored):
        engine.add_request(request)
    (last,) = [output for output in collect(engine) if output.request_id == "scored"]
    assert engine.stats.num_preemptions > 0
    assert [each_logprob.token for each_logprob in last.logprobs] == ids[1:]


def test_a_prompt_of_pictures_alone_can_be_penalised(build_engine: BuildEngine) -> None:
    engine = build_engine()
    engine.add_request(make_request("other", seed=1))
    request = make_request("a", repetition_penalty=1.2)
    engine.add_request(replace(request, prompt_ids=[-200] * 4))
    collect(engine)


def test_cached_tokens_never_exceed_prompt_tokens(build_engine: BuildEngine) -> None:
    engine = build_engine(block_size=4)
    request = make_request("a", num_images=0, max_tokens=30)
    engine.add_request(request)
    outputs = [output for _ in range(25) for output in engine.step()]
    engine.abort("a")
    written = [token for output in outputs for token in output.token_ids]
    engine.add_request(replace(request, begun=[BegunAnswer(written)]))
    usage = last_of(collect(engine)).usage
    assert usage.cached_tokens <= usage.prompt_tokens, usage


def test_an_engine_without_a_queue_accepts_what_it_can_run_now(build_engine: BuildEngine) -> None:
    build_engine(max_running=1, max_waiting=0).add_request(make_request("a"))


def test_more_answers_than_can_ever_wait_are_not_retryable(build_engine: BuildEngine) -> None:
    with pytest.raises(RequestError):
        build_engine(max_running=2, max_waiting=2).add_request(make_request("a", n=5))
