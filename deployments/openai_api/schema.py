"""What the schemas of all JSON bodies share: strict types, a path to whatever is wrong, and fields refused by name.

Unsupported fields that would change the answer are refused; harmless and unknown fields are ignored, because clients
add fields every month. Knows JSON, but not what the fields are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from llava_core.errors import MAX_REPEATED, RequestError

# Commas and brackets, besides those that the text may have: each may cost hundreds of bytes once it is parsed.
_MAX_JSON_TOKENS = 65_536


class Part(BaseModel):
    """An object of a body."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Body(Part):
    """A whole body. `neutral` has the unsupported fields with those values that change nothing; any other value would
    change the answer, and is refused."""

    neutral: ClassVar[Mapping[str, Sequence[object]]] = {}


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_body(body: bytes, schema: type[AnyBody], *, max_text: int) -> AnyBody:
    """Parses a body. Raises RequestError naming the field. `max_text` is the limit of characters for any caller."""
    _refuse_swollen(body, max_text + _MAX_JSON_TOKENS)
    try:
        parsed = schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _as_request_error(first) from None
    _refuse_unsupported(parsed.model_extra or {}, schema.neutral)
    return parsed


def _refuse_swollen(body: bytes, max_tokens: int) -> None:
    """Refuses bodies with too many values: a few bytes of JSON can become a hundred times as many in memory. Base64 has
    none of these characters."""
    # numpy counts many times faster than bytes.count, and lets other threads run meanwhile.
    characters = np.frombuffer(body, np.uint8)
    if sum(np.count_nonzero(characters == mark) for mark in b",[{") > max_tokens:
        raise RequestError("the body holds too many values", code="request_too_complex")


def _as_request_error(error: ErrorDetails) -> RequestError:
    if error["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    path = _path(error["loc"])
    if not path:
        return RequestError("the body must be a JSON object", code="invalid_json")
    message = error["msg"][0].lower() + error["msg"][1:]
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    return RequestError(f"{path}: {message}", param=path, code=code)


def _path(location: Sequence[int | str]) -> str:
    """`messages[0].content[1].image_url.url`: the tags of unions, in angle brackets, are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("<"):
            # The client may have chosen the name.
            name = step[:MAX_REPEATED]
            path += f".{name}" if path else name
    return path


def _refuse_unsupported(extra: Mapping[str, Any], neutral: Mapping[str, Sequence[object]]) -> None:
    for name, value in extra.items():
        if name in neutral and value is not None and not asks_for_nothing(value, neutral[name]):
            raise RequestError(
                f"{name} is not supported by this service; leave it out", param=name, code="unsupported_parameter"
            )


def asks_for_nothing(value: Any, neutral: Sequence[object]) -> bool:
    """Whether a field's value is one of those that do not change the answer."""
    # If an object's type already says what is asked for, the rest of it does not matter.
    is_typed = isinstance(value, dict) and "type" in value
    return value in neutral or (is_typed and {"type": value["type"]} in neutral)
