"""The OpenAPI description of the service, built from its routes: a route without a description here does not start.

The schema of a request is pydantic's, of the class that parses it; the schemas of answers are written down here. Knows
no HTTP server, and nothing about how requests are answered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from deployments.http.deadlines import TIMEOUT_HEADER
from deployments.http.request_ids import REQUEST_ID_HEADER, SOUND_ID
from deployments.llava_protocol.generation import GenerationBody
from deployments.llava_protocol.routes import AddressBody, HeartBeatBody, RegisterBody
from deployments.llava_protocol.streaming import MEDIA_TYPE
from deployments.openai_api.chat_schema import ChatBody
from deployments.openai_api.completion_request import CompletionBody
from deployments.openai_api.tokenize_request import DetokenizeBody, TokenizeBody

Json = dict[str, Any]
_REFERENCE = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"\{(\w+)(:\w+)?\}")
_OF_KEYS = (401, 403, 429)
_OF_BODIES = (400, 404, 408, 413, 415, 429, 500)
_OF_NOTES = (400, 408, 413, 415, 429)
# From the entrance in front of the gateway when that is lost, missing or silent; some routes send them, too.
_OF_THE_ENTRANCE = (502, 503, 504)


@dataclass(frozen=True)
class Operation:
    """What a route does, what it takes, and what it may answer besides 200."""

    summary: str
    answer: str
    body: type[BaseModel] | None = None
    chunk: str | None = None
    errors: tuple[int, ...] = ()
    is_open: bool = False
    media_type: str = "application/json"


# By route name.
OPERATIONS: Mapping[str, Operation] = {
    "chat_completions": Operation(
        "The answer to a conversation with pictures, whole or, with `stream`, piece by piece.",
        "ChatCompletion",
        body=ChatBody,
        chunk="ChatCompletionChunk",
        errors=(*_OF_BODIES, 422),
    ),
    "completions": Operation(
        "The model's continuation of a text, or of token ids, as they are.",
        "Completion",
        body=CompletionBody,
        chunk="CompletionChunk",
        errors=(*_OF_BODIES, 422),
    ),
    "tokenize": Operation("A prompt as the model reads it.", "Tokenized", body=TokenizeBody, errors=(*_OF_BODIES, 422)),
    "detokenize": Operation("The text of token ids.", "Detokenized", body=DetokenizeBody, errors=_OF_BODIES),
    "models": Operation("The models that are served.", "ModelList"),
    "model": Operation("One of the models that are served.", "Model", errors=(404,)),
    "openapi": Operation("This description.", "OpenApi"),
    "llava_list_models": Operation("LLaVA's protocol: the models that are served.", "Models", errors=(400,)),
    "llava_refresh_all_workers": Operation("LLaVA's protocol: query all workers again.", "Nothing", errors=(400,)),
    "llava_get_worker_address": Operation(
        "LLaVA's protocol: the address for a model.", "Address", body=AddressBody, errors=_OF_NOTES
    ),
    "llava_worker_get_status": Operation("LLaVA's protocol: this service as a worker.", "Status", errors=(400,)),
    "llava_register_worker": Operation(
        "LLaVA's protocol: register a worker.", "Nothing", body=RegisterBody, errors=(*_OF_NOTES, 403)
    ),
    "llava_receive_heart_beat": Operation(
        "LLaVA's protocol: a worker's heartbeat.", "Known", body=HeartBeatBody, errors=_OF_NOTES
    ),
    "llava_worker_generate_stream": Operation(
        "LLaVA's protocol: an answer as JSON objects, each followed by a zero byte.",
        "Frames",
        body=GenerationBody,
        errors=(*_OF_BODIES, 422),
        media_type=MEDIA_TYPE,
    ),
    "health": Operation("Whether every stage can serve.", "Health", is_open=True),
}


def describe_api(routes: Sequence[Route], *, has_keys: bool, max_timeout_seconds: float) -> Json:
    """The whole description. Raises LookupError for a route that is not in OPERATIONS."""
    timeout = _header(
        TIMEOUT_HEADER,
        "The time after which the answer is useless, counted from the request's head; it then ends with 504.",
        {"type": "number", "exclusiveMinimum": 0, "maximum": max_timeout_seconds},
    )
    paths: Json = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            path = _PARAMETER.sub(r"{\1}", route.path)
            operation = OPERATIONS[route.name]
            described = _operation(route, operation, has_keys=has_keys)
            described["parameters"] += [_REQUEST_ID, timeout] if method == "POST" else [_REQUEST_ID]
            paths.setdefault(path, {})[method.lower()] = described
    bodies = [(each.body, "validation") for each in OPERATIONS.values() if each.body is not None]
    _, schemas = models_json_schema(bodies, ref_template=_REFERENCE)  # type: ignore[arg-type]
    components: Json = {"schemas": {**schemas.get("$defs", {}), **ANSWERS}}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "llava-serve",
            "version": "1",
            "description": "LLaVA models behind OpenAI's API. Fields that are not named here are ignored where they "
            "are harmless, and refused by name where they would change the answer.",
        },
        "paths": paths,
        "components": components,
        **({"security": [{"key": []}]} if has_keys else {}),
    }


def _operation(route: Route, operation: Operation, *, has_keys: bool) -> Json:
    content = {operation.media_type: {"schema": _ref(operation.answer)}}
    if operation.chunk is not None:
        content["text/event-stream"] = {"itemSchema": _object({"data": _event(operation.chunk)})}
    statuses = {*operation.errors, *_OF_THE_ENTRANCE, *(_OF_KEYS if has_keys and not operation.is_open else ())}
    described: Json = {
        "operationId": route.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": HTTPStatus.OK.phrase, "headers": _ID_OF_ANSWER, "content": content},
            **{str(status): _refusal(status) for status in sorted(statuses)},
        },
        "parameters": [
            {"name": match[1], "in": "path", "required": True, "schema": {"type": "string"}}
            for match in _PARAMETER.finditer(route.path)
        ],
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(operation.body.__name__)}},
        }
    if operation.is_open and has_keys:
        described["security"] = []
    return described


def _refusal(status: int) -> Json:
    content = {"application/json": {"schema": _ref("Error")}}
    wait = {"retry-after": {"schema": {"type": "string"}}} if status in (429, 503) else {}
    return {"description": HTTPStatus(status).phrase, "content": content, "headers": {**_ID_OF_ANSWER, **wait}}


def _header(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "description": description, "schema": schema}


_REQUEST_ID = _header(
    REQUEST_ID_HEADER,
    "The id of this request in the answer and in logs; one that does not match the pattern is replaced.",
    {"type": "string", "pattern": f"^{SOUND_ID}$"},
)
_ID_OF_ANSWER: Json = {REQUEST_ID_HEADER: {"required": True, "schema": {"type": "string"}}}


def _ref(name: str) -> Json:
    return {"$ref": _REFERENCE.format(model=name)}


def _event(chunk: str) -> Json:
    piece = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(chunk)}
    return {"anyOf": [piece, {"const": "[DONE]"}]}


def _object(properties: Json, *, optional: Sequence[str] = ()) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def _list(item: Json) -> Json:
    return {"type": "array", "items": item}


_TEXT: Json = {"type": "string"}
_TEXT_OR_NULL: Json = {"type": ["string", "null"]}
_COUNT: Json = {"type": "integer", "minimum": 0}
_FINISH: Json = {"enum": ["stop", "length"]}
_EXTENSIONS = ("timings", "image_transforms")
_TIMINGS: Json = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": 0},
    "description": "Milliseconds by stage, if the request asked for them.",
}
_TRANSFORMS: Json = {
    "type": "array",
    "items": {"type": ["object", "null"]},
    "description": "How the stored values of each picture became the visible ones, if the request asked for it; null "
    "for pictures whose stored values are the visible ones.",
}


def _reply(kind: str, said: Json) -> Json:
    """`said` is the part of a choice that holds the answer."""
    return _object(_fields(kind, said, _FINISH, _ref("Usage")), optional=_EXTENSIONS)


def _chunk(kind: str, said: Json) -> Json:
    finish = {"enum": [*_FINISH["enum"], None]}
    fields = _fields(kind, said, finish, {"anyOf": [_ref("Usage"), {"type": "null"}]})
    return _object(fields, optional=("usage", *_EXTENSIONS))


def _fields(kind: str, said: Json, finish: Json, usage: Json) -> Json:
    head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
    head["system_fingerprint"] = _TEXT_OR_NULL
    logprobs = {"type": ["object", "null"]}
    choice = _object({"index": _COUNT, **said, "finish_reason": finish, "logprobs": logprobs})
    return {**head, "choices": _list(choice), "usage": usage, "timings": _TIMINGS, "image_transforms": _TRANSFORMS}


ANSWERS: Mapping[str, Json] = {
    "Error": _object(
        {
            "error": _object({"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL}),
            "request_id": _TEXT,
        }
    ),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"image_tokens": _COUNT, "cached_tokens": _COUNT}),
        }
    ),
    "ChatCompletion": _reply(
        "chat.completion",
        {"message": _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}})},
    ),
    "ChatCompletionChunk": _chunk(
        "chat.completion.chunk",
        {"delta": _object({"role": _TEXT, "content": _TEXT}, optional=("role", "content"))},
    ),
    "Completion": _reply("text_completion", {"text": _TEXT}),
    "CompletionChunk": _chunk("text_completion", {"text": _TEXT}),
    "Tokenized": _object(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": _list({"type": "integer"}),
            "token_strs": {"anyOf": [_list(_TEXT), {"type": "null"}]},
        }
    ),
    "Detokenized": _object({"prompt": _TEXT}),
    "Model": _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT}),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Health": _object(
        {"status": {"const": "ok"}, "stages": {"type": "object", "additionalProperties": {"const": "ok"}}}
    ),
    "Models": _object({"models": _list(_TEXT)}),
    "Address": _object({"address": _TEXT}),
    "Status": _object({"model_names": _list(_TEXT), "speed": {"type": "number"}, "queue_length": _COUNT}),
    "Known": _object({"exist": {"type": "boolean"}}),
    "Nothing": {"type": "null"},
    "Frames": _TEXT,
    "OpenApi": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
}
