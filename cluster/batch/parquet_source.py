"""Parquet as the input of a bulk job: one file, or the files of a folder in the order of their names.

Columns are named like the fields of JSON lines; pictures may be paths, bytes, or structs with `bytes`, as image
datasets have them. See sources.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.batch.errors import InputError
from cluster.batch.records import Failure, Record
from cluster.batch.sources import INVALID_ROW, Plan, Span, open_again, row_record

_TEXTS, _OTHERS = ("question", "text"), ("images", "image", "question_id", "id")
# Rows held as Python objects at a time: they may contain pictures.
_READ_ROWS = 64
# Bytes read from a file's end, where Parquet keeps its metadata.
_FOOTER_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Parquet:
    """A span is a row group."""

    files: tuple[Path, ...]
    image_folder: Path
    prompt: str | None
    kind = "Parquet"

    def plan(self) -> Plan:
        """Reads only the files' metadata."""
        digest, spans, row = hashlib.sha256(), list[Span](), 0
        for file in self.files:
            opened = _opened(file)
            self._check_columns(file, opened.schema_arrow.names)
            for group in range(opened.metadata.num_row_groups):
                stop = row + opened.metadata.row_group(group).num_rows
                spans.append(Span(row, stop, file, at=group))
                row = stop
            with open_again(file) as raw:
                size = file.stat().st_size
                raw.seek(max(0, size - _FOOTER_BYTES))
                digest.update(b"%d " % size + raw.read())
        return Plan(row, digest.hexdigest(), tuple(span for span in spans if span.start < span.stop))

    def read(self, span: Span) -> Iterator[Record]:
        """See Source. Each row from a damaged page to the end of the span is a failure."""
        row, opened = span.start, _opened(span.file)
        columns = [name for name in (*_TEXTS, *_OTHERS) if name in opened.schema_arrow.names]
        try:
            for batch in opened.iter_batches(_READ_ROWS, row_groups=[span.at], columns=columns):
                for values in batch.to_pylist():
                    yield row_record(row, values, f"{span.file}, row {row}", self.image_folder, self.prompt)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            for lost in range(row, span.stop):
                yield Record(lost, Failure(INVALID_ROW, f"{span.file}, row group {span.at} is damaged: {error}"))
            return
        if row != span.stop:
            raise InputError(f"{span.file} has changed since the job began: row group {span.at} is different")

    def _check_columns(self, file: Path, names: list[str]) -> None:
        if self.prompt is None and not any(name in names for name in _TEXTS):
            raise InputError(
                f"{file} has neither a column `question` nor `text`, but {', '.join(names)}; "
                "rename one, or give --prompt"
            )


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a Parquet file that can be read: {error}") from error
