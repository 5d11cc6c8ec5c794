"""Replicas that die during an answer, in this process: clients get the same answer as without the failure.

The stages are real, on the tiny checkpoint; the last one's streams break like those of a killed replica.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

import pytest
from ray.exceptions import ActorDiedError
from starlette.testclient import TestClient

from deployments.errors import StageLostError
from deployments.gateway import Gateway
from deployments.graph.handoff import LocalHandoff
from deployments.graph.passage import repeatable
from deployments.graph.pipeline import Pipeline
from deployments.graph.quarantine import Quarantine
from deployments.messages import Item, Rejected, is_last
from deployments.metrics import RETRIES
from llava_core.types import (
    BegunAnswer,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    Message,
    RenderedRequest,
    SamplingParams,
    TextPart,
)
from tests.deployments.fakes import FakeHandle, FakeRecorder, all_ready, answer
from tests.deployments.pictures import data_url, plain


class _Mortal:
    """A handle whose consecutive streams break after the given numbers of items; later ones do not break."""

    deployment_name = "Generator"

    def __init__(self, handle: Any, deaths: list[int], begun: list[Sequence[BegunAnswer]]) -> None:
        self._handle, self._deaths, self._begun = handle, deaths, begun

    def options(self, **options: Any) -> Self:
        return type(self)(self._handle.options(**options), self._deaths, self._begun)

    def remote(self, given: object, begun: Sequence[BegunAnswer] = ()) -> Any:
        self._begun.append(begun)
        call = self._handle.remote(given, begun)
        return _Breaking(call, self._deaths.pop(0)) if self._deaths else call


class _Breaking:
    def __init__(self, call: Any, num_items: int) -> None:
        self._call, self._num_items = call, num_items

    async def __aiter__(self) -> AsyncGenerator[Item, None]:
        num_left = self._num_items
        if not num_left:
            raise ActorDiedError
        async for item in self._call:
            yield item
            num_left -= 1
            if is_last(item):
                return
            if not num_left:
                raise ActorDiedError

    def cancel(self) -> None:
        self._call.cancel()


class _Service:
    def __init__(self, stages: tuple[Any, ...]) -> None:
        *others, generator = stages
        self.deaths: list[int] = []
        self.begun: list[Sequence[BegunAnswer]] = []
        self.recorder = FakeRecorder()
        quarantine = Quarantine(60, recorder=self.recorder)
        mortal = _Mortal(generator, self.deaths, self.begun)
        pipeline = Pipeline(*others, mortal, LocalHandoff(), quarantine, model="tiny-llava")  # type: ignore[arg-type]
        self.client = TestClient(Gateway({"tiny-llava": pipeline}, all_ready).app)


@pytest.fixture(scope="module")
def service(local_stages: tuple[Any, ...]) -> Iterator[_Service]:
    service = _Service(local_stages)
    with service.client:
        yield service


CONTENT = [{"type": "image_url", "image_url": {"url": data_url(plain())}}, {"type": "text", "text": "What is it?"}]
CHAT = {"messages": [{"role": "user", "content": CONTENT}], "max_tokens": 60, "ignore_eos": True}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.95},
    "penalties": {"temperature": 1.2, "seed": 8, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    "log-probabilities": {"temperature": 1.0, "seed": 9, "logprobs": True, "top_logprobs": 3},
    "several": {"temperature": 1.0, "seed": 10, "n": 3, "logprobs": True},
    "several, some finished": {"temperature": 1.5, "seed": 11, "n": 4, "ignore_eos": False, "stop": ["a", "e"]},
}


def _events(service: _Service, path: str, body: dict[str, Any]) -> list[Any]:
    """Return the events of a stream that ends well."""
    response = service.client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.status_code == 200, response.text
    *events, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]", done
    return [json.loads(event) for event in events]


def _combined(events: list[Any]) -> dict[str, Any]:
    """Return what a client has in the end, however it was split into events."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            known = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "ends": [], "heads": 0})
            known["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            known["heads"] += "role" in choice.get("delta", {})
            known["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            given = choice.get("logprobs") or {}
            known["logprobs"] += given.get("content") or []
            known["logprobs"] += [*zip(given.get("tokens", []), given.get("text_offset", []), strict=True)]
    usage = events[-1]["usage"]
    return {"choices": choices, "usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}}


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare answers; the last bits of log-probabilities may differ, since they depend on the batch."""
    for whole in (found, expected):
        for choice in whole["choices"].values():
            numbers = [each.pop("logprob") for each in choice["logprobs"] if isinstance(each, dict)]
            for each in (each for each in choice["logprobs"] if isinstance(each, dict)):
                numbers += [top.pop("logprob") for top in each["top_logprobs"]]
            choice["numbers"] = pytest.approx(numbers, abs=1e-3) if whole is expected else numbers
    assert found == expected


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("deaths", [[1], [2], [3], [2, 1], [0, 2]], ids=str)
def test_a_stream_is_the_same_when_its_replicas_die(
    service: _Service, sampling: dict[str, Any], deaths: list[int]
) -> None:
    body = {**CHAT, **sampling}
    expected = _combined(_events(service, "/v1/chat/completions", body))
    service.begun.clear()
    service.deaths[:] = deaths
    found = _combined(_events(service, "/v1/chat/completions", body))
    assert not service.deaths
    assert len(service.begun) == len(deaths) + 1
    assert any(len(answer.token_ids) for answer in service.begun[-1])
    _assert_same(found, expected)


def test_a_stop_string_across_the_point_of_resumption_is_found(service: _Service) -> None:
    text = _combined(_events(service, "/v1/chat/completions", CHAT))["choices"][0]["text"]
    for start in range(2, 12, 3):
        body = {**CHAT, "stop": [text[start : start + 12]]}
        expected = _combined(_events(service, "/v1/chat/completions", body))
        service.deaths[:] = [1, 1]
        _assert_same(_combined(_events(service, "/v1/chat/completions", body)), expected)
        assert expected["choices"][0]["ends"] == ["stop"]


def test_an_unstreamed_answer_is_complete_too(service: _Service) -> None:
    body = {**CHAT, "temperature": 1.0, "seed": 3, "logprobs": True, "n": 2}
    responses = []
    for deaths in ([], [2]):
        service.deaths[:] = deaths
        response = service.client.post("/v1/chat/completions", json=body).json()
        for choice in response["choices"]:
            choice["logprobs"] = [each["token"] for each in choice["logprobs"]["content"]]
        responses.append((response["choices"], response["usage"]["completion_tokens"]))
    assert responses[0] == responses[1]


def test_completions_resume_with_offsets_and_for_each_of_several_prompts(service: _Service) -> None:
    body = {"prompt": ["Once upon a time", "What"], "max_tokens": 40, "ignore_eos": True, "logprobs": 2}
    expected = _combined(_events(service, "/v1/completions", body))
    service.deaths[:] = [2, 1]
    _assert_same(_combined(_events(service, "/v1/completions", body)), expected)


def test_frames_of_llavas_protocol_keep_growing_after_a_loss(service: _Service) -> None:
    body = {"model": "tiny-llava", "prompt": "USER: Who are you? ASSISTANT:", "temperature": 0, "max_new_tokens": 60}
    texts = []
    for deaths in ([], [1, 2]):
        service.deaths[:] = deaths
        response = service.client.post("/worker_generate_stream", json=body)
        frames = [json.loads(frame) for frame in response.content.split(b"\0") if frame]
        assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(frames))
        assert not any(frame["error_code"] for frame in frames)
        texts.append(frames[-1]["text"])
    assert texts[0] == texts[1]


def test_a_stream_whose_replicas_all_die_fails_and_is_then_refused(service: _Service) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "poison"}]}
    service.begun.clear()
    service.deaths[:] = [1] * 9
    response = service.client.post("/v1/chat/completions", json={**body, "stream": True})
    *_, last = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "content_refused"
    assert len(service.begun) == 4
    service.deaths.clear()
    assert service.client.post("/v1/chat/completions", json=body).status_code == 422
    assert service.client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_retries_are_counted_by_whether_the_answer_had_begun(service: _Service) -> None:
    before = service.recorder.counted.copy()
    service.deaths[:] = [0]
    _events(service, "/v1/chat/completions", CHAT)
    service.deaths[:] = [1]
    _events(service, "/v1/chat/completions", CHAT)
    assert service.recorder.counted - before == {
        (RETRIES, ("generator", "waiting")): 1,
        (RETRIES, ("generator", "streaming")): 1,
    }


def test_lost_features_are_computed_again() -> None:
    """Features may be lost with their machine: then the next replica sees the loss before it can begin."""
    calls: list[tuple[object, ...]] = []

    async def generate(*given: object) -> AsyncGenerator[Item, None]:
        calls.append(given)
        if len(calls) == 1:
            yield answer("a", "b")[0]
            raise ActorDiedError
        if len(calls) == 2:
            yield Rejected(StageLostError("gone"))
            return
        yield answer("a", "b")[1]

    preprocessor, encoder = FakeHandle(prepare=lambda *_: "prepared"), FakeHandle(encode=lambda _: "encoded")
    handles: Any = (preprocessor, encoder, FakeHandle(generate=generate))
    pipeline = Pipeline(*handles, LocalHandoff(), model="m")
    request = GenerationRequest("id", (Message("user", (ImagePart(b"x"),)),), SamplingParams())

    async def read() -> list[Item]:
        return [item async for item in pipeline.stream(request)]

    assert asyncio.run(read()) == answer("a", "b")
    assert (len(preprocessor.calls), len(encoder.calls)) == (2, 2)
    # All calls but the last were cancelled.
    assert [call.is_cancelled for _, _, call in (*preprocessor.calls, *encoder.calls)] == [True, False] * 2
    first, second, third = calls
    assert len(first) == 1
    assert second[1] == third[1] == (BegunAnswer(second[1][0].token_ids),)  # type: ignore[index]


def test_only_sampled_requests_are_given_a_seed() -> None:
    drawn = SamplingParams(temperature=0.7)
    for request in (
        GenerationRequest("id", (Message("user", (TextPart("hi"),)),), drawn),
        CompletionRequest("id", "hi", drawn),
        RenderedRequest("id", "hi", (), drawn),
    ):
        first, second = repeatable(request), repeatable(request)
        assert None not in (seeds := {first.sampling.seed, second.sampling.seed})
        assert len(seeds) == 2
        assert repeatable(first) is first
    greedy = CompletionRequest("id", "hi", SamplingParams())
    assert repeatable(greedy) is greedy


def test_finished_answers_are_neither_lost_nor_repeated(
    service: _Service,
) -> None:
    body = {**CHAT, **SAMPLINGS["several, some finished"]}
    expected = _combined(_events(service, "/v1/chat/completions", body))
    has_ended, num_items = False, 0
    service.begun.clear()
    # The last replica outlives the answer.
    while len(service.begun) != 1 and num_items < 30:
        service.begun.clear()
        service.deaths[:] = [num_items := num_items + 1]
        found = _combined(_events(service, "/v1/chat/completions", body))
        has_ended |= any(each.is_over for each in service.begun[-1])
        _assert_same(found, expected)
    assert has_ended
