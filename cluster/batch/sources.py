"""The input of a bulk job: a JSON-lines file, Parquet or a folder of pictures, planned once and read span by span.

Planning counts rows and computes a digest of the input; any process can read a span, on any machine that sees the same
files. Rows are numbered from 0 in the order of the input. Knows no models and no Ray.
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
# The kind of failure of a row that is not a valid question.
INVALID_ROW = "invalid_row"
_CONVERTED = "`jq -c '.[]' rows.json > rows.jsonl` makes such lines of it"


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop`, and where they are: a byte range of a file and the lines before it, a row group (`at`),
    or names."""

    start: int
    stop: int
    file: Path
    at: int = 0
    num_bytes: int = 0
    num_lines: int = 0
    names: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Plan:
    """What there is to read. `digest` covers the content, as far as it can be known without reading pictures."""

    num_rows: int
    digest: str
    spans: tuple[Span, ...]
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """One input. It is pickled to each process that reads a span."""

    @property
    def kind(self) -> str:
        """The kind of input, for people."""
        ...

    def plan(self) -> Plan:
        """Scan the input. Raises InputError when it cannot be read."""
        ...

    def read(self, span: Span) -> Iterator[Record]:
        """Yield the rows of a span as questions, or as failures where a row is invalid. Raises InputError where the
        file has changed since it was planned."""
        ...


def question_record(row: int, question: Question) -> Record:
    """Build the record with which a question enters the stages."""
    return Record(row, question, question.id, question.names, question.text)


def row_record(row: int, values: Mapping[str, Any], where: str, image_folder: Path, prompt: str | None) -> Record:
    """Build a record from a row's values: a question, or a failure if they are invalid."""
    try:
        return question_record(row, read_question(values, where, image_folder, default_text=prompt))
    except RequestError as error:
        return Record(row, Failure(INVALID_ROW, error.message), question_id(values))


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line. Picture paths are relative to `image_folder`; blank lines are not rows."""

    file: Path
    image_folder: Path
    prompt: str | None
    kind = "JSON lines"

    def plan(self) -> Plan:
        """Reads the file once, keeping none of it in memory."""
        digest, spans, num_rows = hashlib.sha256(), list[Span](), 0
        at = start_at = first_line = start = 0
        try:
            with self.file.open("rb") as file:
                for number, line in enumerate(file):
                    if not num_rows and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                        raise InputError(f"{self.file} is a JSON array, not one JSON object per line: {_CONVERTED}")
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
            raise InputError(f"{span.file} has changed since the job began: rows from {row} on have moved")

    def _record(self, row: int, line: bytes, where: str) -> Record:
        try:
            values = parse_row(line.decode("utf-8-sig"), where)
        except UnicodeDecodeError as error:
            return Record(row, Failure(INVALID_ROW, f"{where} is not UTF-8: {error.reason}"))
        except RequestError as error:
            return Record(row, Failure(INVALID_ROW, error.message))
        return row_record(row, values, where, self.image_folder, self.prompt)


def open_again(file: Path) -> BinaryIO:
    """Open a planned file for reading bytes. Raises InputError, naming this machine, where it cannot be read."""
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(
            f"{file} cannot be read on {os.uname().nodename}: {error.strerror}; "
            "every machine of the cluster must see it"
        ) from error


@dataclass(frozen=True)
class PictureFolder:
    """A row for each picture in a folder and its subfolders, ordered by relative path, which is the row's id.

    Links are followed, each folder once. Whatever is not a file, such as a named pipe, is not a picture.
    """

    folder: Path
    prompt: str
    kind = "a folder of pictures"

    def plan(self) -> Plan:
        """Lists the folder; opens no picture."""
        names, others = list[str](), list[str]()
        for entry in _files(self.folder, set()):
            found = names if Path(entry.name).suffix.lower() in PICTURE_SUFFIXES else others
            found.append(os.path.relpath(entry.path, self.folder))
        names.sort()
        spans = [
            _listed(self.folder, start, names[start : start + SPAN_ROWS]) for start in range(0, len(names), SPAN_ROWS)
        ]
        digest = hashlib.sha256()
        for span in spans:
            digest.update(span.names + b"\0")
        skipped = f"files without a picture's suffix are skipped: {len(others)}, such as {min(others, default='')}"
        notes = (skipped,) if others else ()
        return Plan(len(names), digest.hexdigest(), tuple(spans), notes)

    def read(self, span: Span) -> Iterator[Record]:
        """See Source."""
        for row, name in enumerate(span.names.split(b"\0"), start=span.start):
            path = os.fsdecode(name)
            yield question_record(row, Question(self.prompt, (span.file / path,), path, (path,)))


def _listed(folder: Path, start: int, names: Sequence[str]) -> Span:
    return Span(start, start + len(names), folder, names=b"\0".join(map(os.fsencode, names)))


def _files(folder: str | Path, listed: set[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    """The files of a folder and its subfolders, in a fixed order; a link to nothing counts as a file. `listed` are the
    folders that have been listed, by device and inode."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in listed:
            return
        listed.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if entry.is_dir():
                    yield from _files(entry.path, listed)
                elif entry.is_file() or not os.path.exists(entry.path):
                    yield entry
    except OSError as error:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}") from error
