"""Items become a response: the gateway's tests cover most of it through HTTP, these cover the rest."""

import asyncio
import json
from collections.abc import AsyncGenerator

from deployments.messages import Item, Rejected
from deployments.openai_api.chat_response import ChatAnswer
from deployments.openai_api.completion_response import CompletionAnswer
from deployments.openai_api.reply_form import ReplyForm
from deployments.openai_api.responding import respond
from llava_core.errors import RequestError
from llava_core.types import TokenDelta, Usage


async def _items(*items: Item) -> AsyncGenerator[Item, None]:
    for item in items:
        yield item


def test_a_rejection_names_the_field_as_the_client_wrote_it() -> None:
    answer = ChatAnswer("id", "m", ReplyForm(limit_field="max_completion_tokens"))
    items = _items(Rejected(RequestError("too many", param="max_tokens")))
    response = asyncio.run(respond(answer, items, "r"))
    assert response.status_code == 400
    assert json.loads(bytes(response.body))["error"]["param"] == "max_completion_tokens"


def test_a_reply_waits_for_the_last_of_several_answers() -> None:
    items = _items(
        TokenDelta("id", "a", (1,), "stop", index=1), TokenDelta("id", "b", (1,), "stop", Usage(1, 2), index=0)
    )
    response = asyncio.run(respond(CompletionAnswer("id", "m", ReplyForm(num_answers=2)), items, "r"))
    choices = json.loads(bytes(response.body))["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "b"), (1, "a")]


def test_no_empty_chunk_is_ever_sent() -> None:
    """A server that sends an empty chunk thereby ends the response."""

    async def pieces() -> list[bytes]:
        items = _items(
            TokenDelta("id", "", (1,)), TokenDelta("id", "", (1,)), TokenDelta("id", "x", (1,), "stop", Usage(1, 3))
        )
        response = await respond(CompletionAnswer("id", "m", ReplyForm(stream=True)), items, "r")
        sent: list[bytes] = []

        async def send(message: dict) -> None:
            if message.get("more_body"):
                sent.append(message["body"])

        async def receive() -> dict:
            await asyncio.Event().wait()
            return {}

        await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)  # type: ignore[arg-type]
        return sent

    [piece] = asyncio.run(pieces())
    assert piece.endswith(b"data: [DONE]\n\n")
