"""A bulk job from its first look at the input to its report.

Mistakes are found in the order of what checking costs: settings, input, output, checkpoint, and only then does Ray
start. The driver reads no picture and keeps no row: it holds one byte per row, whether it was written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from cluster.batch.errors import InputError, JobError
from cluster.batch.held import HeldBack
from cluster.batch.manifest import Manifest, model_digest
from cluster.batch.output import Output
from cluster.batch.progress import Progress
from cluster.batch.records import INPUT_ERROR, Answer, Failure, Record
from cluster.batch.report import Report
from cluster.batch.settings import JobSettings
from cluster.batch.sources import Plan, Source

# The error kind of a row that was lost again when retried alone; and the number of such rows above which the rows are
# not blamed, if more were lost than answered.
LOST, _MAX_LOST = "process_lost", 20

Written = npt.NDArray[np.bool_]


class Answering(Protocol):
    """Yields records with answers or failures for the rows that are not yet written, in any order, a block at a time.
    The job closes it at its end: a pipeline that outlives its Ray would start another one."""

    def __call__(
        self, source: Source, plan: Plan, written: Written, *, isolated: bool
    ) -> Generator[list[Record], None, None]:
        """Answer the unwritten rows; with `isolated`, each row alone."""
        ...

    def waits_for(self) -> str:
        """Say what the job waits for. Called from another thread after a while without a row."""
        ...


@dataclass(frozen=True)
class Job:
    """One run. `answering` starts and stops the backend that answers: Ray, or a stand-in in tests."""

    source: Source
    output: Path
    settings: JobSettings
    answering: Callable[[JobSettings], AbstractContextManager[Answering]]
    retries_errors: bool = False

    def run(self, say: Callable[[str], None], progress: TextIO) -> Report:
        """Run the job to its end. Raises JobError; whatever was written until then stays."""
        plan = self.source.plan()
        if not plan.num_rows:
            raise InputError("; ".join((f"the input, {self.source.kind}, has no rows", *plan.notes)))
        with Output(self.output, _manifest(plan, self.source, self.settings)) as output:
            report = Report(plan.num_rows)
            for row in output.resume():
                if not (self.retries_errors and row["error"] is not None):
                    report.count(row)
            report.begin()
            for note in plan.notes:
                say(note)
            if report.done:
                say(f"{report.done} of {plan.num_rows} rows are there already")
            if num_errors := int(output.written.sum()) - report.done:
                say(f"{num_errors} rows that are errors are repeated")
            began = time.monotonic()
            try:
                if left := plan.num_rows - report.done:
                    say(f"{left} rows to answer; the stages are starting")
                    with self.answering(self.settings) as answer, Progress(report, progress, answer.waits_for):
                        if num_errors:
                            output.drop_errors()
                        self._answer_all(answer, plan, output, report, say)
                output.seal()
            finally:
                report.seconds = time.monotonic() - began
                # The report of the run that wrote the last rows says more than one of a run without rows.
                if report.done > report.rows_before or (report.done and not output.report_path.exists()):
                    _write_report(output.report_path, report, say)
        return report

    def _answer_all(
        self, answer: Answering, plan: Plan, output: Output, report: Report, say: Callable[[str], None]
    ) -> None:
        with closing(answer(self.source, plan, output.written, isolated=False)) as blocks:
            self._write(blocks, output, report, tried_again=True)
        num_left = int((~output.written).sum())
        if not num_left:
            return
        say(f"{num_left} rows failed in a batch: each is retried alone")
        answered = report.answered
        with closing(answer(self.source, plan, output.written, isolated=True)) as blocks:
            self._write(blocks, output, report, tried_again=False)
        lost = np.flatnonzero(~output.written)
        if len(lost) > max(_MAX_LOST, report.answered - answered):
            raise JobError(
                f"{len(lost)} rows (from {lost[0]} to {lost[-1]}) were lost with their processes though each ran "
                "alone, and fewer were answered: that is seldom the rows' fault, so none is written as an error. See "
                "Ray's logs for the cause; once it is fixed, the same command resumes from there"
            )
        _put(_lost(plan, self.source, output), output, report)

    def _write(self, blocks: Iterator[list[Record]], output: Output, report: Report, *, tried_again: bool) -> None:
        """Write the blocks. Failures that may not be the row's fault are held back; if they are not, the job ends
        without writing them. Rows that failed in an engine are not written at all if they are to be `tried_again`."""
        held = HeldBack()
        for block in blocks:
            _check_input(block)
            failed, done = held.take(block)
            _put(done if tried_again else failed + done, output, report)
            for record in block:
                report.read_engine(record.reading)
        failed, done = held.rest()
        _put(done if tried_again else failed + done, output, report)


def _put(records: Iterable[Record], output: Output, report: Report) -> None:
    for row in output.write(map(as_row, records)):
        report.count(row)


def _check_input(block: list[Record]) -> None:
    for record in block:
        if isinstance(record.value, Failure) and record.value.kind == INPUT_ERROR:
            raise InputError(record.value.message)


def _write_report(path: Path, report: Report, say: Callable[[str], None]) -> None:
    """Write the report. A failure to do so is only mentioned, lest it hide why the job ended."""
    try:
        path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}")


def _manifest(plan: Plan, source: Source, settings: JobSettings) -> Manifest:
    model = settings.model
    return Manifest(
        plan.num_rows,
        plan.digest,
        model_digest(model.checkpoint.open()),
        {
            "input kind": source.kind,
            "prompt": settings.prompt,
            "template": model.template,
            "dtype": model.dtype,
            "quantization": model.quantization,
            "view": settings.view and asdict(settings.view),
            "sampling": asdict(settings.sampling),
        },
    )


def _lost(plan: Plan, source: Source, output: Output) -> Iterator[Record]:
    """Yield failures for the rows that are missing though they were tried alone."""
    for span in plan.spans:
        if not output.written[span.start : span.stop].all():
            for record in source.read(span):
                if not output.written[record.row]:
                    message = "every process that ran this row alone died or failed; see Ray's logs"
                    yield record.became(Failure(LOST, message))


def as_row(record: Record) -> dict[str, Any]:
    """Return the record as a row of the output."""
    value = record.value
    answer = value if isinstance(value, Answer) else None
    return {
        "row": record.row,
        "question_id": record.id,
        "images": list(record.images),
        "prompt": record.prompt,
        "text": answer and answer.text,
        "token_ids": answer and list(answer.token_ids),
        "finish_reason": answer and answer.finish_reason,
        "usage": answer and asdict(answer.usage),
        "timings": {stage: round(ms, 3) for stage, ms in record.timings.items()},
        "error": {"kind": value.kind, "message": value.message} if isinstance(value, Failure) else None,
    }
