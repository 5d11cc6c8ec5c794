"""OpenAI's own client against the whole graph in this process; answers must equal those of the engine alone."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from deployments.settings.app import AppArgs
from llava_core.checkpoints.load import LoadOptions
from llava_core.inference import LocalModel
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    Message,
    SamplingParams,
    TextPart,
    TokenDelta,
)
from tests.deployments.pictures import plain
from tests.deployments.service import content, messages
from tests.tiny import IMAGE_TOKENS

HELLO: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(local_client: TestClient) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=local_client
    ) as made:
        yield made


@pytest.fixture(scope="module")
def model(local_args: AppArgs) -> str:
    return local_args.models[0].served_name


@pytest.fixture(scope="module")
def in_process(tiny_checkpoint: Path) -> LocalModel:
    return LocalModel(tiny_checkpoint, options=LoadOptions(dtype="float32"))


def _ask(text: str = "hi", **sampling: Any) -> GenerationRequest:
    return GenerationRequest("expected", (Message("user", (TextPart(text),)),), SamplingParams(**sampling))


def _expected(in_process: LocalModel, request: AnyRequest) -> list[list[TokenDelta]]:
    """Return the expected deltas of each answer."""
    deltas = list(in_process.stream(request))
    return [[delta for delta in deltas if delta.index == index] for index in range(request.sampling.n)]


def _text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def _logprobs(deltas: list[TokenDelta]) -> list[float]:
    return [each.logprob for delta in deltas for each in delta.logprobs]


@pytest.mark.parametrize("stream", [False, True])
def test_several_seeded_answers_match_the_engines(
    *, stream: bool, client: openai.OpenAI, model: str, in_process: LocalModel
) -> None:
    values: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 12}
    expected = [_text(deltas) for deltas in _expected(in_process, _ask(**values))]
    assert len(set(expected)) == 3
    if not stream:
        whole = client.chat.completions.create(model=model, messages=HELLO, **values)
        assert [choice.message.content for choice in whole.choices] == expected
        assert whole.usage is not None
        assert whole.usage.completion_tokens == sum(
            len(delta.token_ids) for deltas in _expected(in_process, _ask(**values)) for delta in deltas
        )
        return
    texts, reasons = [""] * 3, dict[int, str]()
    for chunk in client.chat.completions.create(model=model, messages=HELLO, stream=True, **values):
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    assert texts == expected
    assert set(reasons) == {0, 1, 2}


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {"40": 100}},
        {"extra_body": {"repetition_penalty": 3.0}},
        {"extra_body": {"top_k": 3}, "temperature": 2.0, "seed": 1},
        {"extra_body": {"min_p": 0.5}, "temperature": 2.0, "seed": 1},
        {"extra_body": {"stop_token_ids": list(range(3, 100))}},
        {"top_p": 0.2, "temperature": 2.0, "seed": 1},
    ],
)
def test_each_sampling_parameter_reaches_the_engine(
    fields: dict[str, Any], client: openai.OpenAI, model: str, in_process: LocalModel
) -> None:
    sampling = {**fields, **fields.get("extra_body", {})}
    sampling.pop("extra_body", None)
    if "logit_bias" in sampling:
        sampling["logit_bias"] = ((40, 100.0),)
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
    [expected] = _expected(in_process, _ask(max_tokens=24, **sampling))
    [otherwise] = _expected(in_process, _ask(max_tokens=24))
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=24, **fields)
    assert answer.choices[0].message.content == _text(expected) != _text(otherwise)


def test_an_answer_obeys_stop_strings_and_minimum_length(
    client: openai.OpenAI, model: str, in_process: LocalModel
) -> None:
    [whole] = _expected(in_process, _ask(max_tokens=20, ignore_eos=True))
    text = _text(whole)
    stop = text[4:6]
    for given in (stop, ["never", stop]):
        answer = client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=20, stop=given, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    # By far the likeliest token is one that ends the answer.
    ending: dict[str, Any] = {"stop_token_ids": [40], "logit_bias": {"40": 100}}
    for least, num_tokens in ((0, 1), (9, 10)):
        answer = client.chat.completions.create(
            model=model, messages=HELLO, max_completion_tokens=20, extra_body={**ending, "min_tokens": least}
        )
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (num_tokens, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_match_the_engines_with_text_and_bytes(
    *, stream: bool, client: openai.OpenAI, model: str, in_process: LocalModel
) -> None:
    [expected] = _expected(in_process, _ask(max_tokens=12, logprobs=2, ignore_eos=True))
    values: dict[str, Any] = {"max_tokens": 12, "logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True}}
    if stream:
        chunks = list(client.chat.completions.create(model=model, messages=HELLO, stream=True, **values))
        found = [
            each
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for each in choice.logprobs.content or ()
        ]
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    else:
        [choice] = client.chat.completions.create(model=model, messages=HELLO, **values).choices
        assert choice.logprobs is not None
        found, text = choice.logprobs.content or [], choice.message.content or ""
    assert [each.logprob for each in found] == pytest.approx(_logprobs(expected), abs=1e-4)
    assert all(len(each.top_logprobs) == 2 for each in found)
    # Greedy: every token is the likeliest one.
    assert all(each.token == each.top_logprobs[0].token for each in found)
    assert text == _text(expected)
    spelled = bytes(byte for each in found for byte in each.bytes or ())
    assert spelled.decode(errors="replace").lstrip() == text


def test_a_text_is_continued_and_log_probabilities_have_offsets(
    client: openai.OpenAI, model: str, in_process: LocalModel
) -> None:
    request = CompletionRequest(
        "expected", "Once upon", SamplingParams(max_tokens=8, n=2, logprobs=1, seed=3, temperature=1)
    )
    expected = _expected(in_process, request)
    values: dict[str, Any] = {
        "prompt": "Once upon",
        "max_tokens": 8,
        "n": 2,
        "logprobs": 1,
        "seed": 3,
        "temperature": 1,
    }
    whole = client.completions.create(model=model, **values)
    assert [choice.text for choice in whole.choices] == [_text(deltas) for deltas in expected]
    texts, offsets = ["", ""], [list[int](), list[int]()]
    for chunk in client.completions.create(model=model, stream=True, **values):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += (choice.logprobs.text_offset or []) if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    for choice, deltas in zip(whole.choices, expected, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(_logprobs(deltas), abs=1e-4)
        assert choice.logprobs.text_offset == offsets[choice.index]
        assert choice.logprobs.text_offset[0] == 0
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 1 + len("Once upon")


def test_token_ids_are_accepted_as_a_prompt(client: openai.OpenAI, model: str, local_client: TestClient) -> None:
    ids = local_client.post("/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    texts = [client.completions.create(model=model, prompt=prompt).choices[0].text for prompt in ("Once upon", ids)]
    assert texts[0] == texts[1]


def test_a_conversation_with_tools_and_pictures_in_every_turn(
    client: openai.OpenAI, model: str, in_process: LocalModel
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "area", "arguments": '{"of": "it"}'}}
    conversation: list[Any] = [
        {"role": "system", "content": "Be brief."},
        *messages(content(plain("red"), "What?")),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
        *messages(content(plain("blue"), "And?")),
    ]
    call_text = '{"name": "area", "arguments": {"of": "it"}}'
    turns = (
        Message("user", (ImagePart(plain("red")), TextPart("What?"))),
        Message("assistant", (TextPart(call_text),)),
        Message("user", (TextPart("4"), ImagePart(plain("blue")), TextPart("And?"))),
    )
    [expected] = _expected(in_process, GenerationRequest("expected", turns, SamplingParams(max_tokens=9), "Be brief."))
    answer = client.chat.completions.create(model=model, messages=conversation, max_tokens=9)
    assert answer.choices[0].message.content == _text(expected)
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    assert details is not None
    assert details.model_dump()["image_tokens"] == 2 * IMAGE_TOKENS


def test_a_repeated_prompt_is_counted_as_cached(client: openai.OpenAI, model: str) -> None:
    question = messages(content(plain("green"), "A question that nobody has asked before, of some length?"))
    cached = []
    for _ in range(2):
        usage = client.chat.completions.create(model=model, messages=question, max_tokens=2).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[0] < cached[1] < usage.prompt_tokens


def test_usage_of_several_answers_counts_the_prompt_once(client: openai.OpenAI, model: str) -> None:
    one, three = (
        client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=5, n=n, temperature=1, extra_body={"ignore_eos": True}
        ).usage
        for n in (1, 3)
    )
    assert one is not None
    assert three is not None
    assert (three.prompt_tokens, three.completion_tokens) == (one.prompt_tokens, 15)


def test_the_time_of_each_stage_is_reported_on_request(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=messages(content(plain(), "What?")), max_tokens=2, n=2, extra_body={"timings": True}
    )
    timings = answer.model_dump()["timings"]
    stages = {"preprocess", "encode", "transfer", "queue", "prefill", "decode"}
    assert set(timings) == stages | {"total"}
    assert all(math.isfinite(timings[stage]) and timings[stage] >= 0 for stage in stages)


def test_tokens_are_counted_as_they_will_be_charged(
    client: openai.OpenAI, model: str, local_client: TestClient
) -> None:
    question = messages(content(plain(), "What?"))
    counted = local_client.post("/tokenize", json={"messages": question, "model": model}).json()
    usage = client.chat.completions.create(model=model, messages=question, max_tokens=1).usage
    assert usage is not None
    assert counted["count"] == len(counted["tokens"]) == usage.prompt_tokens
    text = local_client.post("/detokenize", json={"tokens": counted["tokens"]}).json()["prompt"]
    assert text.startswith("<s>")
    assert "What?" in text


def test_errors_become_the_clients_own_exceptions(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=model, messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (tools.value.param, tools.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as echo:
        client.completions.create(model=model, prompt="x", echo=True)
    assert (echo.value.param, echo.value.code) == ("echo", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError) as late:
        client.completions.create(model=model, prompt="x" * 600)
    assert (late.value.param, late.value.code) == ("prompt", "context_length_exceeded")


def test_the_asynchronous_client_gets_the_same_answers(
    local_client: TestClient, client: openai.OpenAI, model: str
) -> None:
    values: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 8}

    async def run() -> tuple[str, str]:
        transport = httpx.ASGITransport(app=local_client.app)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http
            ) as made,
        ):
            whole = await made.chat.completions.create(**values)
            text = ""
            async for chunk in await made.chat.completions.create(**values, stream=True):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                await made.chat.completions.create(**{**values, "max_tokens": 10**6})
            return str(whole.choices[0].message.content), text

    expected = client.chat.completions.create(**values).choices[0].message.content
    assert asyncio.run(run()) == (expected, expected)
