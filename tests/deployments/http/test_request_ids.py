"""Which id a request gets, and that the response carries it unless the server adds it."""

import re
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from deployments.http.request_ids import SOUND_ID, RequestIds


async def _echo_request_id(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.state.request_id)


def _client(*, echo: bool) -> TestClient:
    app: Any = RequestIds(Starlette(routes=[Route("/", _echo_request_id)]), echo=echo)
    return TestClient(app)


@pytest.mark.parametrize("echo", [True, False])
def test_the_clients_request_id_is_kept_and_missing_ones_are_generated(*, echo: bool) -> None:
    client = _client(echo=echo)
    mine = client.get("/", headers={"x-request-id": "mine"})
    first, second = client.get("/"), client.get("/")
    assert mine.text == "mine"
    assert first.text != second.text
    for response in (mine, first, second):
        assert response.headers.get("x-request-id") == (response.text if echo else None)
        assert re.fullmatch(SOUND_ID, response.text)


@pytest.mark.parametrize("text", ["", "a b", 'a"', "a\n", "a" * 129, "é", "a,b"])
def test_ids_unfit_for_logs_and_headers_are_not_sound(text: str) -> None:
    assert not re.fullmatch(SOUND_ID, text)
