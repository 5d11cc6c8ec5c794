"""A stream reads the same however it is cut into pieces; an early end is reported with the text so far."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.client.errors import AnswerInterruptedError, InvalidResponseError
from llava_core.client.events import MAX_LINE_BYTES, StreamedAnswer


def event(text: str) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


TEXTS = ["a\u2028b", "é\x85", "😀", "", "line\r\nbreak"]
STREAM = b": \n\nevent: x\r\n" + b"".join(map(event, TEXTS)) + b"id: 3\r\ndata:[DONE]\r\n\r\n" + event("late")


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_a_stream_may_be_cut_anywhere(cuts: list[int]) -> None:
    answer = StreamedAnswer()
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in itertools.pairwise(edges)]
    assert [delta.text for piece in pieces for delta in answer.feed(piece)] == TEXTS
    assert answer.is_done
    answer.check_end()
    assert answer.reply.text == "".join(TEXTS)


def test_an_error_event_interrupts_the_answer_with_its_message() -> None:
    answer = StreamedAnswer("r")
    error = {"error": {"message": "gone", "code": "replica_lost", "param": None}, "request_id": None}
    with pytest.raises(AnswerInterruptedError, match="gone") as raised:
        list(answer.feed(event("Hel") + b"data: " + json.dumps(error).encode() + b"\n\n"))
    assert (raised.value.code, raised.value.text, raised.value.request_id) == ("replica_lost", "Hel", "r")


def test_a_premature_end_is_reported() -> None:
    answer = StreamedAnswer()
    list(answer.feed(event("Hel") + b"data: [DO"))
    with pytest.raises(AnswerInterruptedError, match="ended before the answer did") as raised:
        answer.check_end()
    assert raised.value.text == "Hel"


def test_an_event_without_end_is_refused_before_it_fills_memory() -> None:
    answer = StreamedAnswer()
    piece = b"x" * (MAX_LINE_BYTES // 2 + 1)
    list(answer.feed(piece))
    with pytest.raises(InvalidResponseError, match="no end"):
        list(answer.feed(piece))
