"""A bulk job from its first look at the input to its report.

What can be wrong is found in the order of what it costs: settings, input, output, checkpoint, and only then is there a
Ray. The driver reads no picture and keeps no row: of each row it knows one byte, whether it was written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from cluster.batch.errors import InputError, JobError
from cluster.batch.manifest import Manifest, model_digest
from cluster.batch.output import Output
from cluster.batch.progress import Progress
from cluster.batch.records import Answer, Failure, Record
from cluster.batch.report import Report
from cluster.batch.settings import JobSettings
from cluster.batch.sources import Plan, Source

# What is tried once more, alone, before it counts as the row's own failure; and how many of them in a row are no row's.
ENGINE_ERROR, LOST = "engine_error", "process_lost"
_MAX_FAILED_IN_A_ROW = 200


Written = npt.NDArray[np.bool_]


class Answering(Protocol):
    """Who gives records with answers or failures for the rows that are not written, in any order, some at a time."""

    def __call__(self, source: Source, plan: Plan, written: Written, *, isolated: bool) -> Iterator[list[Record]]:
        """With `isolated` each row alone."""
        ...


@dataclass(frozen=True)
class Job:
    """One run. `answering` begins and ends whoever answers: Ray, or what stands in for it in tests."""

    source: Source
    output: Path
    settings: JobSettings
    answering: Callable[[JobSettings], AbstractContextManager[Answering]]

    def run(self, say: Callable[[str], None], progress: TextIO) -> Report:
        """Raises JobError, with all that was written in its place."""
        plan = self.source.plan()
        for note in plan.notes:
            say(note)
        if not plan.num_rows:
            raise InputError("the input has no rows")
        with Output(self.output, _manifest(plan, self.source, self.settings)) as output:
            report = Report(plan.num_rows)
            for row in output.resume():
                report.count(row)
            report.begin()
            if report.done:
                say(f"{report.done} of {plan.num_rows} rows are there already")
            began = time.monotonic()
            try:
                if report.done < plan.num_rows:
                    with Progress(report, progress):
                        self._answer_all(plan, output, report, say)
                output.seal()
            finally:
                report.seconds = time.monotonic() - began
                _write_report(output.report_path, report, say)
        return report

    def _answer_all(self, plan: Plan, output: Output, report: Report, say: Callable[[str], None]) -> None:
        with self.answering(self.settings) as answer:
            blocks = answer(self.source, plan, output.written, isolated=False)
            self._write(blocks, output, report, retried=(ENGINE_ERROR,))
            if not output.written.all():
                say(f"{int((~output.written).sum())} rows have failed with others: each is tried again, alone")
                blocks = answer(self.source, plan, output.written, isolated=True)
                self._write(blocks, output, report, retried=())
        self._write(iter([list(_lost(plan, self.source, output))]), output, report, retried=())

    def _write(
        self, blocks: Iterator[list[Record]], output: Output, report: Report, *, retried: tuple[str, ...]
    ) -> None:
        """All of them but failures of the kinds that are `retried`."""
        num_failed = 0
        for block in blocks:
            good = [record for record in block if not _failed(record, retried)]
            num_failed = 0 if good else num_failed + len(block)
            if num_failed > _MAX_FAILED_IN_A_ROW:
                raise JobError(f"{num_failed} rows in a row have failed alike, the last so: {block[-1].value}")
            for row in output.write(map(as_row, good)):
                report.count(row)
            for record in block:
                report.read_engine(record.reading)


def _write_report(path: Path, report: Report, say: Callable[[str], None]) -> None:
    """Where it cannot be written, that must not hide why the job ended."""
    try:
        path.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}")


def _manifest(plan: Plan, source: Source, settings: JobSettings) -> Manifest:
    model, folder = settings.model, settings.image_folder
    return Manifest(
        plan.num_rows,
        plan.digest,
        model_digest(model.checkpoint.open()),
        {
            "input kind": source.kind,
            "prompt": settings.prompt,
            "image folder": folder and str(folder),
            "template": model.template,
            "dtype": model.dtype,
            "quantization": model.quantization,
            "sampling": asdict(settings.sampling),
        },
    )


def _failed(record: Record, kinds: tuple[str, ...]) -> bool:
    return isinstance(record.value, Failure) and record.value.kind in kinds


def _lost(plan: Plan, source: Source, output: Output) -> Iterator[Record]:
    """Rows that ended their process, alone, each time they were tried."""
    for span in plan.spans:
        if not output.written[span.start : span.stop].all():
            for record in source.read(span):
                if not output.written[record.row]:
                    yield record.became(Failure(LOST, "each process that had this row alone has ended; see Ray's logs"))


def as_row(record: Record) -> dict[str, Any]:
    """As it stands in the output."""
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
        "error": asdict(value) if isinstance(value, Failure) else None,
    }
