"""The input of a bulk job: a JSON-lines file, Parquet or a folder of pictures, planned once and read span by span.

Planning counts rows and says what identifies the input; spans are read by whichever process, on whichever machine sees
the same files. Rows are numbered from 0 as they stand. Knows no models and no Ray.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cluster.batch.errors import InputError
from cluster.batch.records import Failure, Record
from llava_core.errors import RequestError
from llava_core.questions import Question, parse_row, question_id, read_question

SPAN_ROWS = 4096
PICTURE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .dcm".split())
# What a row is called that is none.
INVALID_ROW = "invalid_row"


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop`, and where they are: bytes of a file, lines before them, names."""

    start: int
    stop: int
    file: Path
    at: int = 0
    num_bytes: int = 0
    num_lines: int = 0
    names: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Plan:
    """What there is to read. `digest` is of the content, as far as it can be told without reading pictures."""

    num_rows: int
    digest: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """One input. It travels to whoever reads a span."""

    @property
    def kind(self) -> str:
        """What it is, for people."""
        ...

    def plan(self) -> Plan:
        """Look through it. Raises InputError when there is nothing to read."""
        ...

    def read(self, span: Span) -> Iterator[Record]:
        """The rows of a span, with questions, or failures where a row is none. Raises InputError where the file is no
        longer what was planned."""
        ...


def question_record(row: int, question: Question) -> Record:
    """As it begins its way through the stages."""
    names = tuple("" if isinstance(image, bytes) else str(image) for image in question.images)
    return Record(row, question, question.id, names, question.text)


def row_record(row: int, values: Mapping[str, Any], where: str, image_folder: Path, prompt: str | None) -> Record:
    """Of what a row holds, which may be no question."""
    try:
        return question_record(row, read_question(values, where, image_folder, default_text=prompt))
    except RequestError as error:
        return Record(row, Failure(INVALID_ROW, error.message), question_id(values))


@dataclass(frozen=True)
class JsonLines:
    """A JSON object a line. Pictures are named from `image_folder`; lines of white space are no rows."""

    file: Path
    image_folder: Path
    prompt: str | None
    kind = "JSON lines"

    def plan(self) -> Plan:
        """Reads the file once, and keeps nothing of it."""
        digest, spans, num_rows = hashlib.sha256(), list[Span](), 0
        at = start_at = first_line = start = 0
        try:
            with self.file.open("rb") as file:
                for number, line in enumerate(file):
                    digest.update(line)
                    at += len(line)
                    num_rows += bool(line.strip())
                    if num_rows - start == SPAN_ROWS:
                        spans.append(Span(start, num_rows, self.file, start_at, at - start_at, first_line))
                        start, start_at, first_line = num_rows, at, number + 1
        except OSError as error:
            raise InputError(f"{self.file} cannot be read: {error.strerror}") from error
        if num_rows > start:
            spans.append(Span(start, num_rows, self.file, start_at, at - start_at, first_line))
        return Plan(num_rows, digest.hexdigest(), tuple(spans))

    def read(self, span: Span) -> Iterator[Record]:
        """See Source."""
        row = span.start
        with open_again(span.file) as file:
            file.seek(span.at)
            lines = file.read(span.num_bytes).split(b"\n")
        for number, line in enumerate(lines, start=span.num_lines + 1):
            if not line.strip():
                continue
            if row == span.stop:
                break
            yield self._record(row, line, f"{span.file}:{number}")
            row += 1
        if row != span.stop:
            raise InputError(f"{span.file} has changed since the job began: rows from {row} on are not where they were")

    def _record(self, row: int, line: bytes, where: str) -> Record:
        try:
            values = parse_row(line.decode("utf-8-sig"), where)
        except UnicodeDecodeError as error:
            return Record(row, Failure(INVALID_ROW, f"{where} is not UTF-8: {error.reason}"))
        except RequestError as error:
            return Record(row, Failure(INVALID_ROW, error.message))
        return row_record(row, values, where, self.image_folder, self.prompt)


def open_again(file: Path) -> BinaryIO:
    """For reading bytes, on a machine that may not have it."""
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(
            f"{file} cannot be read on {os.uname().nodename}: {error.strerror}; "
            "every machine of the cluster must see it"
        ) from error


@dataclass(frozen=True)
class PictureFolder:
    """A row for each picture in a folder and below it, in the order of their names, which are the rows' ids."""

    folder: Path
    prompt: str
    kind = "a folder of pictures"

    def plan(self) -> Plan:
        """Lists the folder; opens no picture."""
        names, num_others = list[str](), 0
        for parent, folders, files in os.walk(self.folder, onerror=_refuse):
            folders.sort()
            for name in files:
                path = os.path.relpath(os.path.join(parent, name), self.folder)
                if Path(name).suffix.lower() in PICTURE_SUFFIXES:
                    names.append(path)
                else:
                    num_others += 1
        names.sort()
        spans = [
            _listed(self.folder, start, names[start : start + SPAN_ROWS]) for start in range(0, len(names), SPAN_ROWS)
        ]
        digest = hashlib.sha256()
        for span in spans:
            digest.update(span.names + b"\0")
        notes = (f"{num_others} files that are no pictures by their names are left out",) if num_others else ()
        return Plan(len(names), digest.hexdigest(), tuple(spans), notes)

    def read(self, span: Span) -> Iterator[Record]:
        """See Source."""
        for row, name in enumerate(span.names.split(b"\0"), start=span.start):
            path = os.fsdecode(name)
            yield question_record(row, Question(self.prompt, (span.file / path,), path))


def _listed(folder: Path, start: int, names: Sequence[str]) -> Span:
    return Span(start, start + len(names), folder, names=b"\0".join(map(os.fsencode, names)))


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed: {error.strerror}") from error
