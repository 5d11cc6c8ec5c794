"""Files dropped onto a terminal, as common terminals write them, and text that only looks like a file."""

import os
from pathlib import Path

import pytest

from llava_core.chat.pictures import read_path, take_pictures
from tests.deployments.pictures import plain


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of awkward names, a file that is no picture, and a picture without a suffix."""
    for name in ("a.png", "my red cat.png", "it's.png", 'a "b" \\c.png', "ä ö.png", "cat"):
        (tmp_path / name).write_bytes(plain())
    (tmp_path / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("{}/a.png", "a.png"),
        ("  {}/a.png  ", "a.png"),
        ("'{}/my red cat.png'", "my red cat.png"),
        ('"{}/my red cat.png"', "my red cat.png"),
        (r"{}/my\ red\ cat.png", "my red cat.png"),
        ("{}/my red cat.png", "my red cat.png"),
        (r"{}/it\'s.png", "it's.png"),
        (r"{}/a\ \"b\"\ \\c.png", 'a "b" \\c.png'),
        (r'"{}/a \"b\" \\c.png"', 'a "b" \\c.png'),
        ("file://{}/my%20red%20cat.png", "my red cat.png"),
        ("file://{}/%C3%A4%20%C3%B6.png", "ä ö.png"),
        ("a.png", "a.png"),
        ("./cat", "cat"),
    ],
)
def test_a_dropped_picture_file_is_recognised(folder: Path, line: str, name: str) -> None:
    paths, text = take_pictures(line.format(folder))
    assert [path.resolve() for path in paths] == [folder / name]
    assert text == ""


@pytest.mark.parametrize(
    ("line", "names", "text"),
    [
        ("a.png What is it?", ["a.png"], "What is it?"),
        ("What is it? 'my red cat.png'", ["my red cat.png"], "What is it?"),
        (
            r"a.png my\ red\ cat.png  Which, a.png or   the other? cat.png a.png",
            ["a.png", "my red cat.png", "a.png"],
            "Which, a.png or   the other? cat.png",
        ),
    ],
)
def test_a_question_may_accompany_dropped_files(folder: Path, line: str, names: list[str], text: str) -> None:
    paths, left = take_pictures(line)
    assert ([path.name for path in paths], left) == (names, text)


@pytest.mark.parametrize(
    "line",
    [
        "What is a cat?",
        "cat",
        "notes.txt",
        "none.png What?",
        "What's in it, 'a' or \"b\"?",
        "",
        "   ",
        "/clear",
        "~nobody/x.png",
        "a\0.png",
        "x" * 10_000 + ".png",
        "'unclosed",
        "back\\",
        "file:///%00.png",
        "  two  blanks  stay  ",
    ],
)
@pytest.mark.usefixtures("folder")
def test_anything_else_stays_unchanged_text(line: str) -> None:
    assert take_pictures(line) == ([], line)


def test_a_pipe_is_not_taken_as_a_picture(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    assert take_pictures("pipe.png") == ([], "pipe.png")


def test_an_explicit_path_may_be_anything(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert read_path(r"my\ red\ cat.png") == read_path("'my red cat.png'") == read_path("my red cat.png")
    assert read_path("~/a.png") == folder / "a.png"
    assert read_path("/no such.png") == Path("/no such.png")
