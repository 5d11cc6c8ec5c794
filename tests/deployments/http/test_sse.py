"""The framing of server-sent events."""

from deployments.http import sse


def test_an_event_is_one_line_of_json_and_a_blank_one() -> None:
    assert sse.event({"a": 1, "b": None}) == b'data: {"a":1,"b":null}\n\n'


def test_line_breaks_are_escaped_and_other_letters_are_utf_8() -> None:
    assert sse.event({"t": "a\nb\r\u2028é"}) == 'data: {"t":"a\\nb\\r\u2028é"}\n\n'.encode()


def test_the_end_is_the_done_event() -> None:
    assert sse.DONE == b"data: [DONE]\n\n"
