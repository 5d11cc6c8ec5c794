"""Clients other than OpenAI's own, over real HTTP: LangChain, LiteLLM (`make test-clients` installs both) and curl."""

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn
from starlette.testclient import TestClient

from benchmarks.ports import free_port
from deployments.settings.app import AppArgs
from tests.deployments.pictures import data_url, plain
from tests.deployments.service import content, messages, until


@pytest.fixture(scope="module")
def url(local_client: TestClient) -> Iterator[str]:
    """The whole graph in this process, behind a server."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(local_client.app, "127.0.0.1", port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def model(local_args: AppArgs) -> str:
    return local_args.models[0].served_name


@pytest.fixture(scope="module")
def question() -> list[Any]:
    return messages(content(plain(), "What?"))


@pytest.fixture(scope="module")
def expected(url: str, model: str, question: list[Any]) -> str:
    """Return the answer that OpenAI's client gets."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=8)
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


def test_langchain(url: str, model: str, question: list[Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    chat = langchain_openai.ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=model, max_tokens=8, max_retries=0, stream_usage=True
    )
    whole = chat.invoke(question)
    assert whole.content == expected
    assert whole.usage_metadata["output_tokens"] <= 8
    pieces = list(chat.stream(question))
    assert "".join(piece.content for piece in pieces) == expected
    assert [piece.usage_metadata for piece in pieces if piece.usage_metadata][-1] == whole.usage_metadata
    assert asyncio.run(chat.ainvoke(question)).content == expected
    likely = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
    assert len(likely.response_metadata["logprobs"]["content"]) == whole.usage_metadata["output_tokens"]
    # A continued conversation, including tool calls.
    call = {"id": "c", "type": "tool_call", "name": "area", "args": {"of": "it"}}
    core = pytest.importorskip("langchain_core.messages")
    history = [
        *question,
        core.AIMessage("", tool_calls=[call]),
        core.ToolMessage("4", tool_call_id="c"),
        ("user", "So?"),
    ]
    assert chat.invoke(history).usage_metadata["input_tokens"] > whole.usage_metadata["input_tokens"]
    with pytest.raises(openai.BadRequestError) as refused:
        chat.bind(response_format={"type": "json_object"}).invoke(question)
    assert refused.value.param == "response_format"


def test_litellm(url: str, model: str, question: list[Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise it would fetch a price table on import.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    values: dict[str, Any] = {
        "model": f"openai/{model}",
        "api_base": f"{url}/v1",
        "api_key": "none",
        "messages": question,
        "max_tokens": 8,
        "max_retries": 0,
    }
    whole = litellm.completion(**values)
    assert whole.choices[0].message.content == expected
    chunks = list(litellm.completion(**values, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert asyncio.run(litellm.acompletion(**values)).choices[0].message.content == expected
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**values, "model": "openai/gpt-9"})
    with pytest.raises(litellm.BadRequestError, match="max_tokens"):
        litellm.completion(**{**values, "max_tokens": 10**6})


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(url: str, model: str, question: list[Any], expected: str) -> None:
    def ask(body: dict[str, Any]) -> str:
        command = ["curl", "-sN", "--noproxy", "*", f"{url}/v1/chat/completions", "--json", "@-"]
        done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    body = {"model": model, "messages": question, "max_tokens": 8}
    assert json.loads(ask(body))["choices"][0]["message"]["content"] == expected
    *events, done, empty = ask({**body, "stream": True}).split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    picture = {"type": "image_url", "image_url": {"url": data_url(b"no picture")}}
    assert json.loads(ask({**body, "messages": messages([picture])}))["error"]["code"] == "invalid_image"
