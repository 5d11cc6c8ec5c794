"""Outputs: each row once, whatever stopped the job that wrote them, and no written row is lost."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.batch import output as output_module
from cluster.batch.errors import OutputError
from cluster.batch.manifest import Manifest
from cluster.batch.output import Output

MANIFEST = Manifest(10, "input", "model")


def row(number: int, **fields: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "image_tokens": 0, "cached_tokens": 0}
    whole = {"question_id": f"q{number}", "images": ["a.png"], "prompt": "What?", "text": "A cat.", "token_ids": [1]}
    rest = {"finish_reason": "stop", "usage": usage, "timings": {"decode": 1.5}, "error": None}
    return {"row": number, **whole, **rest, **fields}


def resumed(path: Path, manifest: Manifest = MANIFEST) -> list[int]:
    with Output(path, manifest) as output:
        return [each["row"] for each in output.resume()]


def write(path: Path, *numbers: int) -> None:
    with Output(path, MANIFEST) as output:
        list(output.resume())
        output.write([row(number) for number in numbers])


@pytest.fixture(params=["answers.jsonl", "answers.parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "new" / request.param


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(output_module, "PART_ROWS", 3)
    return


def test_rows_are_restored_and_not_written_twice(path: Path) -> None:
    write(path, 3, 1)
    with Output(path, MANIFEST) as output:
        assert list(output.resume()) == [row(3), row(1)]
        assert [bool(done) for done in output.written] == [number in (1, 3) for number in range(10)]
        assert output.write([row(1), row(2), row(2)]) == [row(2)]
    assert resumed(path) == [3, 1, 2]


def test_a_truncated_line_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 0, 1)
    whole = path.read_bytes()
    for length in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:length])
        with Output(path, MANIFEST) as output:
            assert [each["row"] for each in output.resume()] == [0]
            output.write([row(1)])
        assert path.read_bytes() == whole


def test_parquet_parts_hold_all_rows(tmp_path: Path, small_parts: None) -> None:
    path = tmp_path / "a.parquet"
    with Output(path, MANIFEST) as output:
        assert list(output.resume()) == []
        for number in range(8):
            output.write([row(number, question_id=number, error={"kind": "a", "message": "b"} if number else None)])
        output.seal()
    assert sorted(each.name for each in path.glob("part*")) == [f"part-{part:05}.parquet" for part in range(3)]
    table = pq.read_table(path).to_pylist(maps_as_pydicts="strict")
    assert [each["row"] for each in table] == list(range(8))
    assert table[1] == row(1, question_id="1", error={"kind": "a", "message": "b"})
    assert resumed(path) == list(range(8))


@pytest.mark.usefixtures("small_parts")
def test_a_deleted_part_is_written_again_without_overwriting_others(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for number in range(9):
        write(path, number)
    (path / "part-00000.parquet").unlink()
    assert resumed(path) == [3, 4, 5, 6, 7, 8]
    write(path, 0, 1, 2)
    assert sorted(resumed(path)) == list(range(9))


ERROR = {"text": None, "token_ids": None, "usage": None, "error": {"kind": "unreadable_file", "message": "not there"}}


def write_some_errors(path: Path) -> None:
    """Write errors as all rows of one part, some of another and none of a third, and one that is in no part yet."""
    with Output(path, MANIFEST) as output:
        list(output.resume())
        for number in range(10):
            output.write([row(number, **ERROR if number in (0, 1, 2, 4, 9) else {})])


@pytest.mark.usefixtures("small_parts")
def test_dropped_errors_are_written_again_and_answers_are_kept(path: Path) -> None:
    write_some_errors(path)
    with Output(path, MANIFEST) as output:
        list(output.resume())
        output.drop_errors()
        assert [number for number in range(10) if not output.written[number]] == [0, 1, 2, 4, 9]
        assert [each["row"] for each in output.write([row(number) for number in range(10)])] == [0, 1, 2, 4, 9]
        output.seal()
    with Output(path, MANIFEST) as output:
        rows = list(output.resume())
    assert sorted(each["row"] for each in rows) == list(range(10))
    assert all(each["error"] is None and each["text"] == "A cat." for each in rows)


@pytest.mark.usefixtures("small_parts")
def test_dying_while_dropping_errors_neither_loses_nor_repeats_an_answer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_some_errors(path)
    num_deaths = 0
    # The job dies at the first of the calls patched below; when restarted, at the second, and so on.
    while True:
        calls = iter(range(num_deaths + 1))

        def dying(real: Any, calls: Iterator[int] = calls) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch, Output(path, MANIFEST) as output:
            assert {3, 5, 6, 7, 8} <= {each["row"] for each in output.resume()}
            for owner, name in ((Path, "rename"), (Path, "unlink"), (output_module, "flush"), (os, "fsync")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                output.drop_errors()
            except KeyboardInterrupt:
                num_deaths += 1
                continue
        break
    assert num_deaths > 1
    assert sorted(resumed(path)) == [3, 5, 6, 7, 8]


@pytest.mark.parametrize("when", ["before the rename", "before the journal is emptied"])
def test_dying_while_sealing_a_part_neither_loses_nor_repeats_a_row(
    when: str, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write(path, 0, 1)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die) if when == "before the rename" else None
        patch.setattr(output_module.Journal, "clear", die)
        with pytest.raises(KeyboardInterrupt):
            write(path, 2)
    with Output(path, MANIFEST) as output:
        assert sorted(each["row"] for each in output.resume()) == [0, 1, 2]
        output.write([row(3)])
        output.seal()
    assert sorted(each["row"] for each in pq.read_table(path).to_pylist()) == [0, 1, 2, 3]


def test_rows_and_parts_are_synced_before_they_count(
    path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the calls shows what a power loss would leave."""
    calls: list[str] = []

    def note(name: str, owner: Any) -> None:
        real = getattr(owner, name)

        def noted(first: Any, *rest: Any) -> Any:
            is_folder = name == "fsync" and stat.S_ISDIR(os.fstat(first).st_mode)
            calls.append("fsync of the folder" if is_folder else name)
            return real(first, *rest)

        monkeypatch.setattr(owner, name, noted)

    for name, owner in (("fsync", os), ("pwrite", os), ("ftruncate", os), ("rename", Path)):
        note(name, owner)
    with Output(path, MANIFEST) as output:
        assert list(output.resume()) == []
        assert calls == ["fsync", "rename", "fsync of the folder"], "the manifest"
        calls.clear()
        output.write([row(0), row(1)])
        assert calls == ["pwrite", "fsync"]
        calls.clear()
        output.write([row(2)])
    sealed = ["fsync", "rename", "fsync of the folder", "ftruncate"] if path.suffix == ".parquet" else []
    assert calls == ["pwrite", "fsync", *sealed]


def test_a_second_job_is_refused_at_once(path: Path) -> None:
    with Output(path, MANIFEST), pytest.raises(OutputError, match="is being written by another job"):
        Output(path, MANIFEST)
    with Output(path, MANIFEST):
        pass


def test_the_lock_of_a_killed_job_is_released(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    program = (
        "import os, signal; from pathlib import Path; from cluster.batch.output import *;"
        f"o = Output(Path({str(path)!r}), Manifest(10, 'input', 'model')); list(o.resume());"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == -9
    assert resumed(path) == []


def test_another_runs_rows_are_refused_and_kept(path: Path) -> None:
    write(path, 1)
    with pytest.raises(OutputError, match=r"another run: model is another one. Name another"):
        resumed(path, Manifest(10, "input", "other"))
    assert resumed(path) == [1]


def test_a_foreign_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"somebody": "else"}')
    with pytest.raises(OutputError, match="does not say which run"):
        resumed(path)
    assert path.read_text() == '{"somebody": "else"}'


def test_damage_is_reported_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 0, 1)
    for damaged in (b"\0\0\0\n", b"[]\n", b'{"row": "x"}\n'):
        path.write_bytes(damaged + path.read_bytes())
        with pytest.raises(OutputError, match=r"a\.jsonl:1 is damaged"):
            resumed(path)
    for strange, message in ((row(10), "row 10, which the input does not have"), (row(0), "rows twice")):
        path.write_text("".join(json.dumps(each) + "\n" for each in (row(0), strange)))
        with pytest.raises(OutputError, match=message):
            resumed(path)


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from cluster.batch.errors import OutputError
from cluster.batch.output import *
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with Output(Path(sys.argv[1]), Manifest(10, "input", "model")) as output:
        list(output.resume())
        for number in range(10):
            output.write([json.loads(sys.argv[3]) | {"row": number}])
except OutputError as error:
    print(error)
"""


def test_a_full_disk_ends_the_job_and_loses_nothing(path: Path) -> None:
    """The system reports it in the middle of a line: a limit on the file size stands in for the full disk."""
    length = len(json.dumps(row(0))) + 1
    command = [sys.executable, "-c", FULL_DISK, str(path), str(3 * length + length // 2), json.dumps(row(0))]
    message = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "cannot be written: File too large; what was written before is whole" in message
    assert "give the same command again" in message
    assert resumed(path) == [0, 1, 2]
    write(path, *range(10))
    assert resumed(path) == list(range(10))


def test_an_unwritable_path_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.jsonl").mkdir()
    for path in (tmp_path / "file" / "a.jsonl", tmp_path / "file" / "a.parquet", tmp_path / "a.jsonl"):
        with pytest.raises(OutputError, match=r"Not a directory|File exists|Is a directory"):
            Output(path, MANIFEST)
    with pytest.raises(OutputError, match=r"file cannot be made a folder: File exists"):
        Output(tmp_path / "file" / "a.jsonl", MANIFEST)


def test_rows_being_written_when_the_job_is_stopped_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with Output(path, MANIFEST) as output:
        list(output.resume())
        monkeypatch.setattr(os, "fsync", stopped)
        with pytest.raises(KeyboardInterrupt):
            output.write([row(0)])
    monkeypatch.undo()
    assert resumed(path) == [0]


def test_an_output_without_rows_leaves_foreign_files_alone(path: Path) -> None:
    path.parent.mkdir()
    (path.parent / "theirs").touch()
    assert resumed(path) == []
    assert [each.name for each in path.parent.iterdir()] == ["theirs"]


def test_the_suffix_must_name_a_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end with \.jsonl"):
        Output(tmp_path / "answers", MANIFEST)


def test_ids_and_names_may_be_anything(path: Path) -> None:
    strange = [row(0, question_id={"a": [1]}), row(1, question_id="\ud800", images=["\udcff.png"], prompt="\udfff")]
    strange.append(row(2, error={"kind": "invalid_image", "message": "\udcff.png is not a picture"}))
    with Output(path, MANIFEST) as output:
        list(output.resume())
        output.write(strange)
        output.seal()
    assert resumed(path) == [0, 1, 2]
