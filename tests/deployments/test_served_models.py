"""Which model a request names, and what serves it."""

import json
from typing import Any

import pytest

from deployments.openai_api.chat_request import read_chat_request
from deployments.openai_api.chat_response import ChatAnswer
from deployments.served_models import ServedModels
from deployments.settings.upstreams import UpstreamArgs
from deployments.upstreams.upstream import Forwarding, Upstream
from llava_core.errors import RequestError, UnknownNameError
from llava_core.request_limits import RequestLimits
from tests.deployments.fakes import ScriptedEngine


async def _no_pictures(_request: object) -> Any:
    raise AssertionError("there are none")


def _upstream(name: str) -> Upstream:
    return Upstream(name, UpstreamArgs(url="http://gpu-1/v1", model="theirs"), _no_pictures)


def test_names_keep_their_order_and_a_single_model_is_the_default() -> None:
    served = ServedModels({"b": _upstream("b"), "a": ScriptedEngine()})
    assert served.names == ("b", "a")
    assert list(served.engines) == ["a"]
    assert served.upstream_states == {"b": "not asked yet"}
    with pytest.raises(RequestError, match="must be one of: a, b"):
        served.chosen(None)
    with pytest.raises(UnknownNameError, match="known are: a, b"):
        served.chosen("c")
    assert ServedModels({"b": _upstream("b")}).chosen(None) == "b"


def test_engine_only_operations_are_refused_for_upstreams() -> None:
    engine = ScriptedEngine()
    served = ServedModels({"a": engine, "b": _upstream("b")})
    assert served.engine("a") is engine
    with pytest.raises(RequestError) as raised:
        served.engine("b")
    assert (raised.value.param, raised.value.code) == ("model", "model_not_here")


def test_a_body_is_read_for_the_model_that_answers() -> None:
    def body(model: str) -> bytes:
        messages = [{"role": "user", "content": "hi"}]
        return json.dumps({"model": model, "messages": messages, "tool_choice": "required"}).encode()

    read = ServedModels({"a": ScriptedEngine(), "b": _upstream("b")}).reader(read_chat_request, ChatAnswer)
    forwarding = read(body("b"), "id", RequestLimits())
    assert isinstance(forwarding, Forwarding)
    assert json.loads(forwarding.asked.encoded())["tool_choice"] == "required"
    # Our own models have no tools.
    with pytest.raises(RequestError, match="tool_choice is not supported"):
        read(body("a"), "id", RequestLimits())
    with pytest.raises(UnknownNameError):
        read(body("c"), "id", RequestLimits())
    assert ServedModels({"a": ScriptedEngine()}).reader(read_chat_request, ChatAnswer) is read_chat_request
