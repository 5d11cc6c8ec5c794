"""The error tree: one base class, the tree in the module's docstring, and pickling that keeps every field."""

import pickle

import pytest

from llava_core import errors
from llava_core.errors import (
    CheckpointError,
    EngineError,
    ImageError,
    LlavaError,
    OverloadedError,
    PromptTooLongError,
    RequestError,
    UnknownNameError,
)

EXAMPLES = [
    LlavaError("base"),
    RequestError("bad field", param="messages[0]", code="too_many_images"),
    ImageError("not an image", param="messages[0].content[1].image_url"),
    ImageError("too many bytes", param="image", code="image_too_large"),
    PromptTooLongError("too long", param="max_tokens"),
    UnknownNameError("model", "gpt-5", ["tiny", "default"]),
    UnknownNameError("template", "v9", ["plain"], param="template"),
    CheckpointError("config.json is missing"),
    OverloadedError("queue full", limit="engine", retry_after_s=7),
    EngineError("not finite"),
]


def tree(cls: type[Exception]) -> list[type[Exception]]:
    ours = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [cls, *(below for child in ours for below in tree(child))]


def test_every_class_is_in_the_tree_and_in_the_docstring() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(tree(LlavaError)) == defined
    assert errors.__doc__ is not None
    assert all(cls.__name__ in errors.__doc__ for cls in defined)


def test_every_class_has_an_example_here() -> None:
    assert {type(error) for error in EXAMPLES} == set(tree(LlavaError))


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_pickling_keeps_class_message_and_fields(error: LlavaError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_request_errors_have_a_field_and_a_stable_code() -> None:
    assert RequestError("x").code == "invalid_value"
    assert ImageError("x", param="image").code == "invalid_image"
    assert PromptTooLongError("x").code == "context_length_exceeded"
    unknown = UnknownNameError("model", "b", ["c", "a"])
    assert (unknown.param, unknown.code) == ("model", "model_not_found")
    assert str(unknown) == "unknown model 'b'; known are: a, c"


def test_a_long_unknown_name_is_shortened() -> None:
    message = UnknownNameError("model", "m" * 5000, ["tiny"]).message
    assert message == f"unknown model {'m' * 100!r}; known are: tiny"
