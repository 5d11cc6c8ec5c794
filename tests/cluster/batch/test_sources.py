"""JSON lines and folders as inputs: every row once, whatever else is in them."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from cluster.batch import sources
from cluster.batch.errors import InputError
from cluster.batch.records import Failure, Record
from cluster.batch.sources import JsonLines, PictureFolder, Source
from llava_core.questions import Question


@pytest.fixture(autouse=True)
def _short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPAN_ROWS", 3)


def read_all(source: Source) -> list[Record]:
    plan = source.plan()
    rows = [record for span in plan.spans for record in source.read(span)]
    assert [record.row for record in rows] == list(range(plan.num_rows))
    return rows


def lines(folder: Path, *rows: object, end: str = "\n") -> JsonLines:
    file = folder / "questions.jsonl"
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    file.write_bytes(b"\n".join(texts) + end.encode())
    return JsonLines(file, folder / "pictures", None)


def test_llavas_question_files_are_read(tmp_path: Path) -> None:
    source = lines(tmp_path, *({"question_id": i, "image": f"{i}.jpg", "text": f"Question {i}"} for i in range(8)))
    for number, record in enumerate(read_all(source)):
        picture = tmp_path / "pictures" / f"{number}.jpg"
        assert record.value == Question(f"Question {number}", (picture,), number)
        assert (record.id, record.images, record.prompt) == (number, (f"{number}.jpg",), f"Question {number}")


def test_a_broken_row_is_a_failure_naming_its_line_and_others_are_read(tmp_path: Path) -> None:
    source = lines(tmp_path, {"text": "a"}, b"", b"{broken", b"   ", b"\xff\xfe", [1], {"text": "b"}, {"image": "x"})
    first, broken, bytes_, wrong, second, no_text = (record.value for record in read_all(source))
    assert (first, second) == (Question("a"), Question("b"))
    for value, line in ((broken, 3), (bytes_, 5), (wrong, 6), (no_text, 8)):
        assert isinstance(value, Failure)
        assert value.kind == "invalid_row"
        assert f"questions.jsonl:{line} " in value.message


def test_a_row_without_a_question_keeps_its_id(tmp_path: Path) -> None:
    [record] = read_all(lines(tmp_path, {"question_id": 3, "image": "a.png"}))
    assert isinstance(record.value, Failure)
    assert record.id == 3


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("number", [1, 3, 4, 7])
def test_the_end_of_a_file_makes_no_difference(end: str, number: int, tmp_path: Path) -> None:
    assert len(read_all(lines(tmp_path, *[{"text": "a"}] * number, end=end))) == number


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    source = lines(tmp_path, *['{"text":\r "a\u2028b\u0085c\x0b"}'.encode() for _ in range(4)])
    assert len(read_all(source)) == 4


def test_a_shared_prompt_applies_to_rows_without_one(tmp_path: Path) -> None:
    file = lines(tmp_path, {"image": "a.png"}, {"text": "own", "image": "b.png"}).file
    assert [record.prompt for record in read_all(JsonLines(file, tmp_path, "for all"))] == ["for all", "own"]


def test_a_file_that_changes_during_a_job_is_detected(tmp_path: Path) -> None:
    source = lines(tmp_path, *[{"text": "a"}] * 6)
    spans = source.plan().spans
    source.file.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="has changed since the job began"):
        list(source.read(spans[1]))


def test_different_contents_have_different_digests(tmp_path: Path) -> None:
    one, same = (lines(tmp_path, {"text": "a"}, {"text": "b"}).plan().digest for _ in range(2))
    other = lines(tmp_path, {"text": "b"}, {"text": "a"}).plan().digest
    assert one == same != other


def test_planning_a_long_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SPAN_ROWS", 4096)
    file = tmp_path / "long.jsonl"
    file.write_text('{"question_id": 1, "image": "picture.jpg", "text": "What is in the picture?"}\n' * 200_000)
    tracemalloc.start()
    plan = JsonLines(file, tmp_path, None).plan()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_rows == 200_000
    assert kept < 100_000
    assert peak < 1_000_000


def test_pictures_of_a_folder_are_rows_and_other_files_are_reported(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt", "x\udcff.dcm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    source = PictureFolder(tmp_path, "What?")
    assert source.plan().notes == ("files without a picture's suffix are skipped: 1, such as notes.txt",)
    rows = read_all(source)
    assert [record.id for record in rows] == ["a.JPG", "b.png", "sub/c.webp", "x\udcff.dcm"]
    assert rows[2].value == Question("What?", (tmp_path / "sub/c.webp",), "sub/c.webp")
    assert rows[2].images == ("sub/c.webp",)


def test_linked_folders_are_listed_once_and_only_files_are_pictures(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for name in (folder / "own/a.png", elsewhere / "b.png"):
        name.parent.mkdir(parents=True)
        name.touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked-again").symlink_to(elsewhere)
    (folder / "own/circle").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    rows = read_all(PictureFolder(folder, "What?"))
    assert [record.id for record in rows] == ["gone.png", "linked/b.png", "own/a.png"]


@pytest.mark.parametrize("start", ["[", "\n [\n", "\ufeff["])
def test_a_json_array_is_refused_with_a_conversion(tmp_path: Path, start: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(f'{start}{{"text": "a"}},\n{{"text": "b"}}]\n')
    with pytest.raises(InputError, match=r"rows\.json is a JSON array, .* `jq "):
        JsonLines(file, tmp_path, None).plan()


def test_another_picture_changes_the_digest(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    before = PictureFolder(tmp_path, "What?").plan().digest
    assert PictureFolder(tmp_path, "What?").plan().digest == before
    (tmp_path / "b.png").write_bytes(b"")
    assert PictureFolder(tmp_path, "What?").plan().digest != before


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        JsonLines(tmp_path / "none.jsonl", tmp_path, None).plan()
    with pytest.raises(InputError, match="none cannot be listed"):
        PictureFolder(tmp_path / "none", "What?").plan()
