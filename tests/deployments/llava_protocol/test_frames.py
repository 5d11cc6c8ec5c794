"""Frames: the bytes of the reference, additional error fields, and whatever a worker sends in place of frames."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import StageLostError, StageUnavailableError, WorkerFailedError
from deployments.llava_protocol import frames
from deployments.llava_protocol.frames import SERVER_ERROR, Frame, FrameReader, encode, error_frame
from llava_core.errors import EngineError, RequestError, UnknownNameError


def test_frames_have_the_same_bytes_as_the_reference() -> None:
    assert encode(Frame("USER: é\n Hi"), "r") == b'{"text": "USER: \\u00e9\\n Hi", "error_code": 0}\0'
    # A lone surrogate, which cannot be encoded.
    assert encode(Frame("\ud83d"), "r") == b'{"text": "\\ud83d", "error_code": 0}\0'


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("bad", param="images"), 1),
        (EngineError("broken"), 1),
        (ZeroDivisionError("oops"), 1),
        (UnknownNameError("model", "x", ["m"]), 2),
        (StageLostError("gone"), 3),
        (StageUnavailableError("gone"), 3),
        (WorkerFailedError("garbage", "a frame is not JSON"), 3),
    ],
)
def test_an_error_has_the_references_text_and_code_plus_its_cause(error: Exception, code: int) -> None:
    frame = json.loads(encode(error_frame(error), "r1").removesuffix(b"\0"))
    assert list(frame) == ["text", "error_code", "error", "request_id"]
    assert (frame["text"], frame["error_code"], frame["request_id"]) == (SERVER_ERROR, code, "r1")
    assert set(frame["error"]) == {"message", "type", "param", "code"}
    explained = json.loads(encode(error_frame(error), "r1", explains=True).removesuffix(b"\0"))
    assert explained == frame | {"text": f"{SERVER_ERROR}\n\n{frame['error']['message']}"}


def test_internal_errors_are_reported_in_our_words() -> None:
    for error in (ZeroDivisionError("/etc/secret"), WorkerFailedError("unreachable", "/etc/secret")):
        assert b"secret" not in encode(error_frame(error), "r", explains=True)


@given(st.lists(st.tuples(st.text(), st.integers(0, 3)), max_size=5), st.lists(st.integers(0, 400), max_size=6))
def test_frames_are_reassembled_however_they_are_split(given: list[tuple[str, int]], cuts: list[int]) -> None:
    content = b"".join(encode(Frame(text, code), "r") for text, code in given)
    bounds = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    reader = FrameReader()
    read = [frame for start, end in itertools.pairwise(bounds) for frame in reader.feed(content[start:end])]
    reader.finish()
    assert [(frame.text, frame.error_code) for frame in read] == given


@pytest.mark.parametrize(
    "content",
    [
        b"\0",
        b"<html>\0",
        b'"text"\0',
        b"[]\0",
        b"{}\0",
        b'{"text": "x"}\0',
        b'{"text": 1, "error_code": 0}\0',
        b'{"text": "x", "error_code": "0"}\0',
        b'{"text": "x", "error_code": true}\0',
        b"\xff\xfe\0",
        b"[" * 100_000 + b"\0",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_an_invalid_frame_is_a_failure_of_the_worker(content: bytes) -> None:
    with pytest.raises(WorkerFailedError) as caught:
        list(FrameReader().feed(content))
    assert caught.value.kind == "garbage"


def test_the_length_of_a_frame_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    reader = FrameReader()
    list(reader.feed(b"x" * 100))
    with pytest.raises(WorkerFailedError, match="more than 100 bytes"):
        list(reader.feed(b"x"))


def test_a_truncated_frame_is_a_failure() -> None:
    reader = FrameReader()
    assert len(list(reader.feed(b'{"text": "x", "error_code": 0}\0{"text": "x y"'))) == 1
    with pytest.raises(WorkerFailedError, match="cut_off"):
        reader.finish()
