"""The output of a bulk job: every row once, whatever stopped the job before, whoever else would like to write it.

Answers are appended to a journal of JSON lines by the job's driver alone, which holds its lock; nowhere else is it
decided that a row is done. For Parquet, journals are sealed: written as a part under a temporary name, renamed, and
only then emptied. Knows no Ray and nothing of how answers come about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.batch.errors import OutputError
from cluster.batch.journal import Journal, Row
from cluster.batch.manifest import Manifest, check_same
from llava_core.disk import flush

# Rows of a part.
PART_ROWS = 10_000
_PART = re.compile(r"part-(\d+)\.parquet")
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        # Ids of any kind in one column: what is no text is JSON.
        ("question_id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("usage", pa.map_(pa.string(), pa.int64())),
        ("timings", pa.map_(pa.string(), pa.float64())),
        ("error", pa.struct([("kind", pa.string()), ("message", pa.string())])),
    ]
)


class Output:
    """The rows of one run. `written` says of each row of the input whether it is done."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Raises OutputError where it cannot be written, or holds anything but rows of the same run."""
        if path.suffix not in (".jsonl", ".parquet"):
            raise OutputError(f"{path} must end with .jsonl, for one file, or with .parquet, for a folder of parts")
        self.path = path
        self._parts = path if path.suffix == ".parquet" else None
        self.written: npt.NDArray[np.bool_] = np.zeros(manifest.num_rows, bool)
        folder = path if self._parts else path.parent
        self._made = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be made a folder: {error.strerror}") from error
        self._journal = Journal(self._beside("journal.jsonl") if self._parts else path)
        self._num_open = 0
        self._manifest = manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Of a job that was refused or stopped before its first row nothing is left."""
        if self._is_new():
            self._remove()
        self._journal.close()

    @property
    def report_path(self) -> Path:
        """Where the job's report belongs."""
        return self._beside("report.json")

    def resume(self) -> Iterator[dict[str, Any]]:
        """The rows that are there already, each once; all must be taken before another is written."""
        check_same(self._beside("manifest.json"), self._manifest, is_new=self._is_new())
        for part in self._sealed():
            for batch in pq.ParquetFile(part).iter_batches():
                yield from filter(self._mark, batch.to_pylist(maps_as_pydicts="strict"))
        # A journal that was sealed and not emptied any more holds rows of the last part.
        kept, was_sealed = 0, False
        for row in self._journal.rows():
            if self._mark(row):
                kept += 1
                yield row
            else:
                was_sealed = True
        if was_sealed and kept:
            raise OutputError(f"{self.path} holds rows twice; name another output")
        if was_sealed:
            self._journal.clear()
        self._num_open = kept

    def write(self, rows: Iterable[Row]) -> list[Row]:
        """Those of the rows that are not there yet, which are these from now on."""
        new = [row for row in rows if self._mark(row)]
        self._journal.append(new)
        self._num_open += len(new)
        if self._parts and self._num_open >= PART_ROWS:
            self.seal()
        return new

    def seal(self) -> None:
        """The end of a part."""
        if not self._parts or not self._num_open:
            return
        table = pa.Table.from_pylist([_columns(row) for row in self._journal.rows()], _SCHEMA)
        # Of the parts that were there some may be gone: a number is that of no other.
        numbers = [int(found[1]) for part in self._sealed() if (found := _PART.fullmatch(part.name))]
        self._put_part(self._parts / f"part-{max(numbers, default=-1) + 1:05}.parquet", table)
        self._journal.clear()
        self._num_open = 0

    def drop_errors(self) -> None:
        """Rows that are errors are not there any more, and may be written again. To be called after `resume`. Each file
        is replaced as a whole by one without them."""
        for part in self._sealed():
            table = pq.read_table(part)
            is_error = table["error"].is_valid()
            numbers = table.filter(is_error)["row"].to_numpy()
            if len(numbers) == table.num_rows:
                part.unlink()
            elif len(numbers):
                self._put_part(part, table.filter(pc.invert(is_error)))
            self.written[numbers] = False
        dropped = self._journal.drop(lambda row: row["error"] is not None)
        self.written[dropped] = False
        self._num_open -= len(dropped)

    def _put_part(self, part: Path, table: pa.Table) -> None:
        temporary = self._beside("part.tmp")
        try:
            pq.write_table(table, temporary)
            flush(temporary)
            temporary.rename(part)
            flush(part.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"{part} cannot be written: {error}; what was written before is whole. "
                "Make room and give the same command again"
            ) from error

    def _mark(self, row: Row) -> bool:
        """Whether the row was not there before."""
        number = row["row"]
        if not 0 <= number < len(self.written):
            raise OutputError(f"{self.path} holds row {number}, which the input does not have; name another output")
        was_there = bool(self.written[number])
        self.written[number] = True
        return not was_there

    def _sealed(self) -> list[Path]:
        return sorted(self._parts.glob("part-*.parquet")) if self._parts else []

    def _remove(self) -> None:
        """What was made for rows that have not come. A folder with anything else in it stays."""
        with suppress(OSError):
            (self._beside("journal.jsonl") if self._parts else self.path).unlink()
            self._beside("manifest.json").unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()

    def _is_new(self) -> bool:
        return self._journal.is_empty() and not self._sealed()

    def _beside(self, name: str) -> Path:
        # Readers of Parquet leave out what begins so.
        return self._parts / f"_{name}" if self._parts else self.path.with_name(f"{self.path.name}.{name}")


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the journal as Parquet has it."""
    known = row["question_id"]
    return {
        **row,
        "question_id": known if known is None else _utf8(known if isinstance(known, str) else json.dumps(known)),
        "images": [_utf8(image) for image in row["images"]],
        "prompt": row["prompt"] and _utf8(row["prompt"]),
        **{name: list((row[name] or {}).items()) for name in ("usage", "timings")},
    }


def _utf8(text: str) -> str:
    """Halves of characters, which JSON and file names may have, written out."""
    return text.encode(errors="backslashreplace").decode()
