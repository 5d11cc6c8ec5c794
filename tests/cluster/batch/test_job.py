"""A job from its input to its report, with a stand-in for Ray: what is written, retried, given up and reported."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.batch.errors import CapacityError, InputError, JobError, OutputError
from cluster.batch.job import Answering, Job
from cluster.batch.records import INPUT_ERROR, UNREADABLE, Answer, Failure, Record
from cluster.batch.report import Report
from cluster.batch.settings import JobSettings, ModelSettings
from cluster.batch.sources import JsonLines, PictureFolder, Source
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.questions import Question
from llava_core.types import SamplingParams, Usage
from llava_core.views import DicomView

GOOD = Answer("A cat.", (1, 2), "stop", Usage(5, 2, 3))
# The outcome of a row, or None where it is lost with its process.
Becomes = Callable[[Record, bool], Answer | Failure | None]


def standing_in(becomes: Becomes) -> Any:
    class StandIn:
        is_open = False

        def __call__(self, source: Any, plan: Any, written: Any, *, isolated: bool) -> Any:
            self.is_open = True
            try:
                for span in plan.spans:
                    yield from self._of(source.read(span), written, isolated=isolated)
            finally:
                self.is_open = False

        def _of(self, records: Iterator[Record], written: Any, *, isolated: bool) -> Iterator[list[Record]]:
            for record in records:
                if not written[record.row]:
                    value = record.value if isinstance(record.value, Failure) else becomes(record, isolated)
                    if value is not None:
                        yield [record.became(value, decode=10.0)]

        def waits_for(self) -> str:
            return "nothing"

    @contextmanager
    def answering(_: JobSettings) -> Iterator[Answering]:
        stand_in = StandIn()
        try:
            yield stand_in
        finally:
            assert not stand_in.is_open, "a pipeline that ends later than its Ray would start another one"

    return answering


class JobRunner:
    """Runs jobs on one input, and remembers their messages."""

    def __init__(self, folder: Path, checkpoint: Path, num_rows: int = 5) -> None:
        self.file = folder / "in.jsonl"
        self.source: Source = JsonLines(self.file, folder, None)
        self.file.write_text("".join(json.dumps({"id": i, "text": f"q{i}"}) + "\n" for i in range(num_rows)))
        self.output = folder / "out.jsonl"
        self.checkpoint = checkpoint
        self.messages: list[str] = []

    def run(self, becomes: Becomes, *, retries_errors: bool = False, **settings: Any) -> Report:
        model = ModelSettings(FoundCheckpoint(str(self.checkpoint), None, {}, offline=True))
        job = Job(self.source, self.output, JobSettings(model, **settings), standing_in(becomes), retries_errors)
        return job.run(self.messages.append, io.StringIO())

    def rows(self) -> dict[int, dict[str, Any]]:
        rows = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({row["row"] for row in rows}) == len(rows)
        return {row["row"]: row for row in rows}


@pytest.fixture
def runner(tmp_path: Path, tiny_checkpoint: Path) -> JobRunner:
    return JobRunner(tmp_path, tiny_checkpoint)


def test_every_row_and_the_report_are_written(runner: JobRunner) -> None:
    report = runner.run(lambda _, __: GOOD)
    assert runner.rows()[3] == {
        "row": 3,
        "question_id": 3,
        "images": [],
        "prompt": "q3",
        "text": "A cat.",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "image_tokens": 3, "cached_tokens": 0},
        "timings": {"decode": 10.0},
        "error": None,
    }
    assert len(runner.rows()) == report.answered == 5
    assert json.loads((runner.output.parent / "out.jsonl.report.json").read_text()) == report.as_json()


def test_an_invalid_row_becomes_an_error_row_and_others_are_answered(runner: JobRunner) -> None:
    lines = runner.file.read_text().splitlines()
    runner.file.write_text("\n".join([*lines[:2], "{broken", *lines[3:]]))
    report = runner.run(lambda _, __: GOOD)
    assert (report.answered, report.errors) == (4, {"invalid_row": 1})
    error = runner.rows()[2]["error"]
    assert error["kind"] == "invalid_row"
    assert "in.jsonl:3 is not a JSON object" in error["message"]


def test_a_job_without_rows_creates_no_files_and_keeps_an_existing_report(runner: JobRunner, tmp_path: Path) -> None:
    def refused(*_: object) -> Answer:
        raise CapacityError("no GPU")

    for name in ("new/out.jsonl", "new/out.parquet"):
        runner.output = tmp_path / name
        with pytest.raises(CapacityError):
            runner.run(refused)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl"]
    runner.output = tmp_path / "out.jsonl"
    runner.run(lambda *_: GOOD)
    report = tmp_path / "out.jsonl.report.json"
    before = report.read_text()
    assert runner.run(refused).rows_before == 5
    assert report.read_text() == before
    report.unlink()
    runner.run(refused)
    assert json.loads(report.read_text())["done"] == 5


def test_skipped_files_are_reported_only_if_the_output_is_valid(runner: JobRunner, tmp_path: Path) -> None:
    for name in ("pictures/a.png", "pictures/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    runner.source = PictureFolder(tmp_path / "pictures", "What?")
    runner.output = tmp_path / "out.csv"
    with pytest.raises(OutputError, match="must end with"):
        runner.run(lambda *_: GOOD)
    assert runner.messages == []
    runner.output = tmp_path / "out.jsonl"
    runner.run(lambda *_: GOOD)
    assert runner.messages == [
        "files without a picture's suffix are skipped: 1, such as notes.txt",
        "1 rows to answer; the stages are starting",
    ]


def test_a_stopped_job_resumes_and_asks_no_row_twice(runner: JobRunner) -> None:
    asked: list[int] = []

    def stopped(record: Record, _: object) -> Answer:
        if record.row == 3:
            raise KeyboardInterrupt
        asked.append(record.row)
        return GOOD

    with pytest.raises(KeyboardInterrupt):
        runner.run(stopped)
    assert json.loads((runner.output.parent / "out.jsonl.report.json").read_text())["done"] == 3

    def rest(record: Record, _: object) -> Answer:
        asked.append(record.row)
        return GOOD

    report = runner.run(rest)
    assert asked == [0, 1, 2, 3, 4]
    assert "3 of 5 rows are there already" in runner.messages
    assert (report.done, report.rows_before) == (5, 3)
    runner.run(lambda *_: pytest.fail("there is nothing to ask"))
    assert len(runner.rows()) == 5


def test_error_rows_are_repeated_on_request(runner: JobRunner) -> None:
    runner.run(lambda record, _: Failure("invalid_image", "broken") if record.row in (1, 3) else GOOD)
    runner.run(lambda *_: pytest.fail("there is nothing to ask"))
    asked: list[int] = []

    def stopped(record: Record, _: object) -> Answer:
        asked.append(record.row)
        if record.row == 3:
            raise KeyboardInterrupt
        return GOOD

    with pytest.raises(KeyboardInterrupt):
        runner.run(stopped, retries_errors=True)
    assert "2 rows that are errors are repeated" in runner.messages
    assert sorted(runner.rows()) == [0, 1, 2, 4]
    report = runner.run(recording(asked), retries_errors=True)
    assert asked == [1, 3, 3]
    assert (report.answered, report.errors, report.rows_before) == (5, {}, 4)
    assert all(row["error"] is None for row in runner.rows().values())


def recording(asked: list[int]) -> Becomes:
    def becomes(record: Record, _: object) -> Answer:
        asked.append(record.row)
        return GOOD

    return becomes


def test_rows_that_fail_in_a_batch_are_retried_alone(runner: JobRunner) -> None:
    broken = Failure("engine_error", "no memory")

    def becomes(record: Record, isolated: bool) -> Answer | Failure | None:  # noqa: FBT001
        if record.row == 1:
            return GOOD if isolated else broken
        if record.row == 2:
            return broken
        if record.row == 3:
            return GOOD if isolated else None
        return None if record.row == 4 else GOOD

    report = runner.run(becomes)
    rows = runner.rows()
    assert [rows[number]["text"] for number in (0, 1, 3)] == ["A cat."] * 3
    assert rows[2]["error"] == {"kind": "engine_error", "message": "no memory"}
    assert rows[4]["error"]["kind"] == "process_lost"
    assert rows[4]["prompt"] == "q4"
    assert report.errors == {"engine_error": 1, "process_lost": 1}
    assert "4 rows failed in a batch: each is retried alone" in runner.messages


def test_an_engine_that_fails_every_row_ends_the_job_without_error_rows(tmp_path: Path, tiny_checkpoint: Path) -> None:
    runner = JobRunner(tmp_path, tiny_checkpoint, num_rows=300)
    with pytest.raises(JobError, match=r"rows in a row have failed alike.*device is gone"):
        runner.run(lambda *_: Failure("engine_error", "the device is gone"))
    assert not runner.output.exists()
    assert runner.run(lambda *_: GOOD).answered == 300


def test_an_engine_that_breaks_during_retries_ends_the_job_without_error_rows(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    runner = JobRunner(tmp_path, tiny_checkpoint, num_rows=300)
    broken = Failure("engine_error", "the device is gone")

    def becomes(record: Record, isolated: bool) -> Answer | Failure | None:  # noqa: FBT001
        return None if not isolated else GOOD if record.row < 10 else broken

    with pytest.raises(JobError, match=r"rows in a row have failed alike.*device is gone"):
        runner.run(becomes)
    assert sorted(runner.rows()) == list(range(10))
    assert runner.run(lambda *_: GOOD).answered == 300


def test_many_unreadable_pictures_end_the_job_and_a_few_are_error_rows(tmp_path: Path, tiny_checkpoint: Path) -> None:
    missing = Failure(UNREADABLE, "volume/a.png cannot be read", is_certain=False)
    runner = JobRunner(tmp_path, tiny_checkpoint, num_rows=300)
    with pytest.raises(JobError, match=r"none of the first 201 pictures can be read.*volume/a\.png"):
        runner.run(lambda *_: missing)
    assert runner.run(lambda *_: GOOD).answered == 300
    runner = JobRunner(tmp_path, tiny_checkpoint, num_rows=200)
    runner.output = tmp_path / "few.jsonl"
    assert runner.run(lambda *_: missing).errors == {UNREADABLE: 200}
    assert runner.rows()[7]["error"] == {"kind": UNREADABLE, "message": missing.message}


def test_many_rows_lost_in_retries_end_the_job_without_error_rows(tmp_path: Path, tiny_checkpoint: Path) -> None:
    runner = JobRunner(tmp_path, tiny_checkpoint, num_rows=60)
    with pytest.raises(JobError, match=r"40 rows \(from 20 to 59\) were lost .* none is written as an error"):
        runner.run(lambda record, isolated: GOOD if isolated and record.row < 20 else None)
    assert sorted(runner.rows()) == list(range(20))


def test_lost_rows_among_answered_ones_become_error_rows(tmp_path: Path, tiny_checkpoint: Path) -> None:
    runner = JobRunner(tmp_path, tiny_checkpoint, num_rows=60)
    report = runner.run(lambda record, isolated: GOOD if isolated and record.row % 2 else None)
    assert (report.answered, report.errors) == (30, {"process_lost": 30})


def test_an_input_that_has_changed_ends_the_job(runner: JobRunner) -> None:
    gone = Failure(INPUT_ERROR, "in.jsonl has changed")
    with pytest.raises(InputError, match=r"^in\.jsonl has changed$"):
        runner.run(lambda record, _: gone if record.row == 3 else GOOD)
    assert sorted(runner.rows()) == [0, 1, 2]


def test_a_different_run_may_not_write_to_the_same_output(runner: JobRunner, checkpoint_copy: Path) -> None:
    runner.run(lambda *_: GOOD)
    with pytest.raises(OutputError, match=r"sampling\.temperature was 0\.0 and is 0\.5"):
        runner.run(lambda *_: GOOD, sampling=SamplingParams(temperature=0.5))
    with pytest.raises(OutputError, match=r"view was None and is \{'frame': 2, 'window': \[40.0, 400.0\]\}"):
        runner.run(lambda *_: GOOD, view=DicomView(2, (40.0, 400.0)))
    with pytest.raises(OutputError, match="prompt was None and is 'What"):
        runner.run(lambda *_: GOOD, prompt="What?")
    (checkpoint_copy / "chat_template.jinja").write_text("another")
    runner.checkpoint = checkpoint_copy
    with pytest.raises(OutputError, match="model is another one"):
        runner.run(lambda *_: GOOD)
    runner.file.write_text('{"text": "another"}\n' * 5)
    with pytest.raises(OutputError, match="input is another one"):
        runner.run(lambda *_: GOOD)


def test_a_job_resumes_after_its_input_has_moved(runner: JobRunner, tmp_path: Path) -> None:
    runner.run(lambda *_: GOOD)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    runner.source = JsonLines(runner.file.rename(moved / "in.jsonl"), moved, None)
    runner.run(lambda *_: pytest.fail("there is nothing to ask"))
    assert "5 of 5 rows are there already" in runner.messages


def test_an_input_without_rows_is_refused(runner: JobRunner, tmp_path: Path) -> None:
    runner.file.write_text("\n \n")
    with pytest.raises(InputError, match=r"the input, JSON lines, has no rows$"):
        runner.run(lambda *_: GOOD)
    (tmp_path / "IM0001").touch()
    (tmp_path / "in.jsonl").unlink()
    runner.source = PictureFolder(tmp_path, "What?")
    with pytest.raises(InputError, match=r"a folder of pictures, has no rows; files .* skipped: 1, such as IM0001$"):
        runner.run(lambda *_: GOOD)
    assert not runner.output.exists()


def test_rows_with_the_same_id_are_told_apart_by_their_number(runner: JobRunner) -> None:
    runner.file.write_text('{"id": "same", "text": "a"}\n{"id": "same", "text": "b"}\n')
    runner.run(lambda record, _: Answer(record.prompt or "", (), "stop", GOOD.usage))
    assert {number: (row["question_id"], row["text"]) for number, row in runner.rows().items()} == {
        0: ("same", "a"),
        1: ("same", "b"),
    }


def test_the_stand_in_gets_the_questions(runner: JobRunner) -> None:
    """Confirms that the tests above are about rows of the input."""
    seen: list[object] = []
    runner.run(lambda record, _: seen.append(record.value) or GOOD)  # type: ignore[func-returns-value]
    assert seen == [Question(f"q{number}", (), number) for number in range(5)]
