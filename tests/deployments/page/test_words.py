"""Every error of a service is explained with what to do about it, and figures are shown in one line."""

import pytest

from deployments.page.words import figures, in_words
from llava_core.client import AnswerInterruptedError, Choice, ConnectionFailedError, Reply, TimeoutExceededError
from llava_core.client.errors import InvalidResponseError, status_error
from llava_core.errors import RequestError
from llava_core.types import Usage
from llava_core.views import ImageTransform, Window


@pytest.mark.parametrize(
    ("status", "code", "after", "expected"),
    [
        (401, "invalid_api_key", None, "Enter yours in the settings"),
        (403, "permission_denied", None, "does not permit that"),
        (429, "overloaded", 2.4, "busy. Because. Try again in 3 seconds."),
        (429, "rate_limit_exceeded", 1, "Try again in 1 second."),
        (429, "overloaded", None, "Try again in a moment."),
        (413, "request_too_large", None, "smaller or fewer pictures"),
        (503, "unavailable", 5, "loading its model, or a part of it is being replaced. Try again in 5 seconds."),
        (500, "internal_error", None, "tell whoever runs it"),
        (504, "deadline_exceeded", None, "took too long"),
        (400, "context_length_exceeded", None, "Clear the conversation"),
        (400, "invalid_image", None, "Try another file"),
        (422, "content_refused", None, "Leave the picture out"),
        (404, "model_not_found", None, "Because."),
    ],
)
def test_each_refusal_is_explained_with_what_to_do(status: int, code: str, after: float | None, expected: str) -> None:
    body = f'{{"error": {{"message": "because", "code": "{code}"}}, "request_id": "r-1"}}'.encode()
    shown = in_words(status_error(status, body, retry_after_s=after))
    assert expected in shown
    assert shown.endswith("(request r-1)")


def test_connection_failures_and_other_errors_are_explained() -> None:
    assert "may still be starting" in in_words(ConnectionFailedError("the connection to http://inside failed"))
    assert "inside" not in in_words(ConnectionFailedError("the connection to http://inside failed"))
    assert "no such service" in in_words(InvalidResponseError("what is no JSON"))
    assert "too long" in in_words(TimeoutExceededError("late"))
    assert in_words(AnswerInterruptedError("the stream ended")).startswith("The answer broke off. The stream ended.")
    assert in_words(RequestError("a picture is gone", param="image")) == "A picture is gone."


def test_figures_show_tokens_rate_and_stages() -> None:
    times = {"preprocess": 4.6, "encode": 12, "prefill": 20, "decode": 500, "total": 1540}
    reply = Reply((Choice("x", "stop"),), Usage(200, 51), times)
    assert figures(reply) == (
        "51 tokens · 100 tokens/s · 1.5 s in all · preprocess 5 ms · encode 12 ms · prefill 20 ms · decode 500 ms"
    )


def test_a_single_token_has_no_rate_and_missing_usage_gives_no_figures() -> None:
    assert figures(Reply((Choice("x", "stop"),), Usage(3, 1), {"decode": 1.0})) == "1 token · decode 1 ms"
    assert figures(Reply((Choice("x", "stop"),))) == ""


def test_figures_show_truncation_and_window() -> None:
    seen = ImageTransform("DICOM", "MONOCHROME2", 12, window=Window(40, 400, "LINEAR", "file"))
    reply = Reply((Choice("x", "length"),), image_transforms=(None, seen))
    assert figures(reply) == "cut off at the token limit · DICOM 12 bit, window 40/400"
