"""Errors made from response bodies of every kind, and the details they carry."""

import json
import pickle

import pytest

from llava_core.client.errors import (
    AnswerInterruptedError,
    AuthenticationError,
    BadRequestError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    ServiceError,
    TimeoutExceededError,
    error_details,
    status_error,
)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequestError),
        (413, BadRequestError),
        (422, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (429, RateLimitError),
        (500, ServerError),
        (503, ServerError),
        (504, TimeoutExceededError),
        (302, InvalidResponseError),
        (204, InvalidResponseError),
    ],
)
def test_each_status_has_its_class(status: int, kind: type[ServiceError]) -> None:
    assert type(status_error(status, b"")) is kind


def test_the_services_error_details_are_kept() -> None:
    body = {"error": {"message": "bad", "code": "c", "param": "p"}, "request_id": "its own"}
    error = status_error(400, json.dumps(body).encode(), request_id="of the header", retry_after_s=3)
    assert (error.message, error.code, error.param, error.request_id) == ("bad", "c", "p", "its own")
    assert (error.status, error.retry_after_s) == (400, 3)
    assert str(error) == "bad (status 400, code c, param p, request its own)"


@pytest.mark.parametrize("body", [b"<html>Bad Gateway</html>", b"\xff\xfe", b"[1]", b'{"error": null}', b"{}", b""])
def test_other_error_bodies_are_shortened(body: bytes) -> None:
    error = status_error(502, body, request_id="r")
    assert error.message.startswith("the service answered 502")
    assert (error.code, error.request_id) == (None, "r")
    assert len(status_error(502, b"x" * 100_000).message) < 400


def test_error_bodies_of_other_shapes_are_understood() -> None:
    assert error_details(b'{"error": "broken"}') == {
        "message": "broken",
        "code": None,
        "param": None,
        "request_id": None,
    }
    details = error_details({"error": {"code": 3}})
    assert details is not None
    assert (details["code"], details["message"]) == ("3", "the service gave no reason")


def test_errors_survive_pickling() -> None:
    error = AnswerInterruptedError("x", status=200, code="c", param="p", request_id="r", retry_after_s=1.5)
    error.text = "so far"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is AnswerInterruptedError
    assert vars(copy) == vars(error)
    assert copy.text == "so far"
