"""Questions in files, and the errors about invalid ones."""

import io
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_core.checkpoints.describe import load_preparer
from llava_core.errors import ImageError, RequestError
from llava_core.questions import Question, parse_row, prepare_question, question_id, read_question, read_questions
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


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        '{"image": "a.png"}',
        '{"text": "a", "images": [3]}',
        '{"text": "", "image": "a.png"}',
        '{"text": "a", "image": ""}',
    ],
)
def test_an_invalid_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(RequestError, match=r"questions\.jsonl:2 "):
        list(read_questions(write(tmp_path, f'{{"text": "a"}}\n{line}\n')))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "x needs `question`, a text that is not empty"),
        ({"question": " ", "image": "a.png"}, "x needs `question`, a text that is not empty"),
        ({"text": 3}, "x has 3 as `text`, not a text"),
        ({"question": ["a"]}, "x has a list as `question`, not a text"),
        ({"text": "a", "image": False}, "x has false as `image`, not the name or the contents of a file"),
        ({"text": "a", "images": ["a.png", None]}, "x has null in `images`, not the name or the contents of a file"),
        ({"text": "a", "images": ["a.png", ""]}, "x has an empty text in `images`, not the"),
        ({"text": "a", "image": {"url": "b"}}, "x has an object as `image`, not the name or the contents of a file"),
        ({"text": "a", "image": {"path": ""}}, "x has an object as `image`, not the name or the contents of a file"),
        ({"text": {"a": 1}}, "x has an object as `text`, not a text"),
        ({"text": "a", "image": "https://h/a.png"}, "x has 'https://h/a.png' as `image`, but pictures are read from"),
        ({"text": "a", "images": ["data:,x"]}, "x has 'data:,x' in `images`, but pictures are read from files"),
        ({"text": "a", "image": {"path": "s3://b/a.png"}}, "x has 's3://b/a.png' as `image`, but pictures are"),
        ({"text": "a", "image": "a\0.png"}, "x has 'a\\x00.png' as `image`, which no file can be called"),
        ({"text": "a", "image": "\ud83d.png"}, "x has '\\ud83d.png' as `image`, which no file can be called"),
        ({"text": "a", "image": Path("a")}, "x has a value of type PosixPath as `image`, not"),
    ],
)
def test_the_field_that_is_wrong_is_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"):
        read_question(row, "x", Path("/p"))


def test_the_default_text_is_for_questions_without_one() -> None:
    folder = Path("/pictures")
    for row in ({"image": "a.png"}, {"text": None}, {"text": ""}, {"question": " \n"}):
        assert read_question(row, "x", folder, default_text="What?").text == "What?"
    assert read_question({"text": "Why?", "image": "a.png"}, "x", folder, default_text="What?").text == "Why?"


def test_pictures_keep_the_names_that_the_row_gave_them() -> None:
    question = read_question({"text": "a", "images": ["./x.png", "/y.png", {"bytes": b"z"}]}, "x", Path("/p"))
    assert question.names == ("./x.png", "/y.png", "")


def test_of_two_field_names_the_one_with_a_value_counts() -> None:
    question = read_question({"question": "", "text": "Why?", "images": [], "image": "a.png"}, "x", Path("/p"))
    assert question == Question("Why?", (Path("/p/a.png"),))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question_id": 0, "id": 1}, 0),
        ({"question_id": None, "id": "a"}, "a"),
        ({"question_id": math.nan, "id": 2.5}, 2.5),
        ({"id": math.inf}, None),
        ({}, None),
    ],
)
def test_any_id_is_kept_except_non_finite_numbers(row: dict[str, object], found: object) -> None:
    assert question_id(row) == found


def test_only_newlines_separate_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_bytes('\ufeff{"text":\r "a\u2028b"}\r\n{"text": "c\u0085d"}'.encode())
    assert [question.text for question in read_questions(file)] == ["a\u2028b", "c\u0085d"]


def test_a_row_must_be_a_json_object() -> None:
    assert parse_row('{"a": 1}', "x") == {"a": 1}
    with pytest.raises(RequestError, match=r"^x is not a JSON object but list"):
        parse_row("[1]", "x")


def test_a_picture_may_be_given_as_bytes(tiny_checkpoint: Path) -> None:
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
