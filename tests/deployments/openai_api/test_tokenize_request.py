"""Tokenizing: messages as in a chat, or a prompt as in completions; anything else is refused."""

import json
from typing import Any

import pytest

from deployments.openai_api.tokenize_request import (
    TokenizeRequest,
    read_detokenize_request,
    read_tokenize_request,
    tokenized_body,
)
from llava_core.errors import RequestError
from llava_core.prompts.tokenize import Tokenized
from llava_core.request_limits import RequestLimits
from llava_core.types import CompletionRequest, GenerationRequest

USER = {"role": "user", "content": "hi"}


def _read(**fields: Any) -> TokenizeRequest:
    return read_tokenize_request(json.dumps(fields).encode(), "id", RequestLimits())


def test_messages_and_prompts_are_understood() -> None:
    chat = _read(messages=[{"role": "system", "content": "s"}, USER], model="m").read
    assert isinstance(chat.generation, GenerationRequest)
    assert (chat.generation.system, chat.form.num_leading, chat.form.model) == ("s", 1, "m")
    assert chat.generation.template is None
    other = _read(messages=[USER], template="v0").read.generation
    assert isinstance(other, GenerationRequest)
    assert other.template == "v0"
    text = _read(prompt="hi", return_token_strs=True)
    assert isinstance(text.read.generation, CompletionRequest)
    assert (text.read.generation.prompt, text.with_texts, text.read.form.prompt_field) == ("hi", True, "prompt")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": [USER], "prompt": "x"}, "messages"),
        ({"messages": []}, "messages"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
        ({"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": [USER], "chat_template": "x"}, "chat_template"),
        ({"messages": [USER], "tools": [{}]}, "tools"),
        ({"messages": [USER], "template": "v9"}, "template"),
        ({"prompt": "x", "template": "v0"}, "template"),
    ],
)
def test_a_mistake_is_refused_naming_the_field(fields: dict, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        _read(**fields)
    assert caught.value.param == param


def test_the_reply_has_vllms_format() -> None:
    tokenized = Tokenized((1, 7), (b"<s>", b"\xc3"), 512)
    plain = {"count": 2, "max_model_len": 512, "tokens": [1, 7], "token_strs": None}
    assert tokenized_body(tokenized, with_texts=False) == plain
    assert tokenized_body(tokenized, with_texts=True)["token_strs"] == ["<s>", "\ufffd"]


def test_token_ids_are_read_and_checked() -> None:
    assert read_detokenize_request(b'{"tokens": [1, 2]}', "id", RequestLimits()).ids == (1, 2)
    for tokens in ("[-1]", "[1.5]", "5", "null"):
        with pytest.raises(RequestError):
            read_detokenize_request(f'{{"tokens": {tokens}}}'.encode(), "id", RequestLimits())
