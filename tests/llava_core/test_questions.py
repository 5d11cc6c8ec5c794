"""Questions as files hold them, and what is said of those that are none."""

import io
from pathlib import Path

import pytest
from PIL import Image

from llava_core.checkpoints.describe import load_preparer
from llava_core.errors import ImageError, RequestError
from llava_core.questions import Question, parse_question, prepare_question, read_question, read_questions
from llava_core.types import SamplingParams


def write(folder: Path, text: str) -> Path:
    file = folder / "questions.jsonl"
    file.write_text(text)
    return file


def test_every_spelling_of_a_question_is_read(tmp_path: Path) -> None:
    lines = [
        '{"question": "a", "images": ["x.png", "/y.png"], "id": "k"}',
        "",
        '{"text": "b", "image": "z.png", "question_id": 3}',
        '{"text": "c", "image": null}',
    ]
    assert list(read_questions(write(tmp_path, "\n".join(lines)))) == [
        Question("a", (tmp_path / "x.png", Path("/y.png")), "k"),
        Question("b", (tmp_path / "z.png",), 3),
        Question("c", ()),
    ]


@pytest.mark.parametrize("line", ["not JSON", "[]", '{"image": "a.png"}', '{"text": "a", "images": [3]}'])
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(RequestError, match=r"questions\.jsonl:2 "):
        list(read_questions(write(tmp_path, f'{{"text": "a"}}\n{line}\n')))


def test_a_text_for_all_is_for_those_that_have_none() -> None:
    folder = Path("/pictures")
    assert parse_question('{"image": "a.png"}', "x", folder, default_text="What?").text == "What?"
    assert parse_question('{"text": "Why?", "image": "a.png"}', "x", folder, default_text="What?").text == "Why?"


def test_a_picture_may_be_its_bytes(tiny_checkpoint: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    rows = [{"text": "a", "image": data} for data in (buffer.getvalue(), {"bytes": buffer.getvalue(), "path": None})]
    questions = [read_question(row, "row 1", Path("/")) for row in rows]
    assert questions[0] == questions[1] == Question("a", (buffer.getvalue(),))
    preparer = load_preparer(tiny_checkpoint)
    [image] = prepare_question(preparer, questions[0], SamplingParams(), "1").images
    assert image.size == (40, 30)
    with pytest.raises(ImageError, match=r"^image 2: "):
        prepare_question(preparer, Question("a", (buffer.getvalue(), b"no picture")), SamplingParams(), "1")
