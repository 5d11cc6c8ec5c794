"""Every field of every route with every wrong value, through the whole graph: an answer or a 4xx, never a 5xx."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from deployments.openai_api.chat_schema import ChatBody
from deployments.openai_api.completion_request import CompletionBody

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 1},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 1, "temperature": 1},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
}
FIELDS = {
    CHAT: [*ChatBody.model_fields, *ChatBody.neutral],
    COMPLETIONS: [*CompletionBody.model_fields, *CompletionBody.neutral],
    "/tokenize": ["model", "messages", "prompt", "return_token_strs", "add_generation_prompt"],
    "/detokenize": ["model", "tokens"],
}
# As JSON, because some have no equivalent in Python.
BAD = [
    *(
        '"three"',
        '""',
        '"\\u0000"',
        '"\\ud800"',
        "null",
        "[]",
        "[null]",
        "[[]]",
        '[""]',
        '["x", 1]',
        "[-200]",
        "[1e400]",
    ),
    *("{}", '{"a": []}', '{"1": 1e400}', '{"-1": 1}', '{"role": "tool"}', '[{"role": "assistant"}]', "true", "false"),
    *("-1", "0", "-0.0", "1", "1.5", "5e-324", "1e308", "NaN", "-Infinity", "1000000000000", "9" * 400, "9" * 5000),
    *("[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200),
]


def _bodies(path: str, field: str) -> Iterator[str]:
    for value in BAD:
        others = {name: each for name, each in BASES[path].items() if name != field}
        yield json.dumps(others)[:-1] + (", " if others else "") + f'"{field}": {value}}}'


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in FIELDS for field in dict.fromkeys(FIELDS[path])])
def test_any_value_of_a_field_is_accepted_or_refused(path: str, field: str, local_client: TestClient) -> None:
    refused = 0
    for body in _bodies(path, field):
        response = local_client.post(path, content=body.encode())
        assert response.status_code == 200 or 400 <= response.status_code < 500, (body[:300], response.text)
        if response.status_code != 200:
            refused += 1
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert len(error["message"]) < 500, body[:300]
    assert refused
