"""Moderation of questions before they are asked: by a function, or by an address with OpenAI's API. A question that
cannot be checked is not asked."""

import asyncio
import json
import sys
import types
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.page.moderation import ModerationError, NotAllowedError, check, load_moderation


@pytest.fixture
def rules() -> Iterator[str]:
    """Yield the name of a module with moderating functions."""
    module = types.ModuleType("rules_of_a_page")

    async def later(text: str) -> str | None:
        return "it is long" if len(text) > 10 else None

    module.__dict__.update(at_once=lambda text: "it names a drug" if "aspirin" in text else None, later=later)
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


def _check(named: str | None, text: str, handler: Any = None) -> None:
    transport = None if handler is None else httpx.MockTransport(handler)
    asyncio.run(check(load_moderation(named, transport=transport), text))


@pytest.mark.parametrize(("function", "reason"), [("at_once", "it names a drug"), ("later", "it is long")])
def test_the_reason_given_by_a_function_is_reported(rules: str, function: str, reason: str) -> None:
    _check(f"{rules}:{function}", "fine")
    with pytest.raises(NotAllowedError, match=f"not sent: {reason}. Edit it"):
        _check(f"{rules}:{function}", "aspirin or not?")


@pytest.mark.parametrize("named", ["nowhere:function", "json:nothing", "json", ":", ""])
def test_an_invalid_function_is_detected_at_the_start(named: str) -> None:
    with pytest.raises(ModerationError, match="neither an address nor"):
        load_moderation(named)


def test_without_moderation_every_question_is_allowed() -> None:
    _check(None, "anything")


def test_a_moderation_url_is_called_with_openais_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_MODERATION_KEY", "k")
    seen: list[httpx.Request] = []

    def judge(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        bad = "bad" in json.loads(request.content)["input"]
        result = {"flagged": bad, "categories": {"violence": bad, "self-harm": False}}
        return httpx.Response(200, json={"results": [result]})

    # Quotes, backslashes and line breaks arrive as they are.
    _check("http://judge/v1", 'a "quoted" \\ text\n', judge)
    assert json.loads(seen[0].content) == {"input": 'a "quoted" \\ text\n'}
    assert seen[0].headers["authorization"] == "Bearer k"
    with pytest.raises(NotAllowedError, match="about violence"):
        _check("http://judge/v1", "bad", judge)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(500),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"results": []}),
        httpx.Response(200, json={"results": [{}]}),
        httpx.Response(200, json=[]),
    ],
)
def test_an_invalid_verdict_blocks_the_question(response: httpx.Response) -> None:
    with pytest.raises(ModerationError, match="could not be checked"):
        _check("http://judge", "text", lambda _: response)


def test_an_unreachable_moderator_blocks_the_question() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(ModerationError, match="could not be checked"):
        _check("http://judge", "text", refuse)
