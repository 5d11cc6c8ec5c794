"""A question's two forms of answer, and the requests that choose between them."""

from llava_core.scenes.question import SENTENCE_REQUESTS, SHORT_REQUESTS, Question


def test_requests_for_the_two_forms_differ() -> None:
    assert not set(SENTENCE_REQUESTS) & set(SHORT_REQUESTS)
    assert all(request.endswith(".") for request in (*SENTENCE_REQUESTS, *SHORT_REQUESTS))


def test_equal_questions_are_equal_and_hash_the_same() -> None:
    assert (
        len({Question("count", "How many?", "2", "There are 2."), Question("count", "How many?", "2", "There are 2.")})
        == 1
    )
