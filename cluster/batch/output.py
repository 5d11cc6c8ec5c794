"""The output of a bulk job: every row once, whatever stopped the job before, whoever else tries to write it.

Only the job's driver, which holds the lock, appends answers to the journal of JSON lines; nothing else decides that a
row is done. For Parquet, journals are sealed: written as a part under a temporary name, renamed, and only then emptied.
Knows no Ray and nothing of how answers are made.
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

# Rows per part.
PART_ROWS = 10_000
_PART = re.compile(r"part-(\d+)\.parquet")
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        # Ids of any type in one column: an id that is not text is stored as JSON.
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
    """The rows of one run. `written` has one entry per row of the input: whether it is done."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Raises OutputError where the output cannot be written."""
        suffix = path.suffix.lower()
        if suffix not in (".jsonl", ".parquet"):
            raise OutputError(f"{path} must end with .jsonl, for one file, or with .parquet, for a folder of parts")
        self.path = path
        self._parts = path if suffix == ".parquet" else None
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
        """Leave nothing behind of a job that was refused or stopped before its first row."""
        if self._is_new():
            self._remove()
        self._journal.close()

    @property
    def report_path(self) -> Path:
        """The path of the job's report."""
        return self._beside("report.json")

    def resume(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are already there, each once; consume all of them before writing another.

        Raises OutputError where the output holds anything but rows of the same run.
        """
        check_same(self._beside("manifest.json"), self._manifest, is_new=self._is_new())
        for part in self._sealed():
            for batch in pq.ParquetFile(part).iter_batches():
                yield from filter(self._mark, batch.to_pylist(maps_as_pydicts="strict"))
        # A journal that was sealed but not yet emptied holds rows of the last part.
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
        """Write the rows that are not there yet, and return those."""
        new = [row for row in rows if self._mark(row)]
        self._journal.append(new)
        self._num_open += len(new)
        if self._parts and self._num_open >= PART_ROWS:
            self.seal()
        return new

    def seal(self) -> None:
        """Turn the journal's rows into a part; does nothing for JSON lines or an empty journal."""
        if not self._parts or not self._num_open:
            return
        table = pa.Table.from_pylist([_columns(row) for row in self._journal.rows()], _SCHEMA)
        # Some parts may have been removed: counting the rest could reuse a number.
        numbers = [int(found[1]) for part in self._sealed() if (found := _PART.fullmatch(part.name))]
        self._put_part(self._parts / f"part-{max(numbers, default=-1) + 1:05}.parquet", table)
        self._journal.clear()
        self._num_open = 0

    def drop_errors(self) -> None:
        """Remove the rows that are errors, so that they can be written again. To be called after `resume`. Each file is
        replaced as a whole by one without them."""
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
        """Mark the row as written, and return whether it is new."""
        number = row["row"]
        if not 0 <= number < len(self.written):
            raise OutputError(f"{self.path} holds row {number}, which the input does not have; name another output")
        was_there = bool(self.written[number])
        self.written[number] = True
        return not was_there

    def _sealed(self) -> list[Path]:
        return sorted(self._parts.glob("part-*.parquet")) if self._parts else []

    def _remove(self) -> None:
        """Remove the files and folders created for rows that never came. A folder with anything else in it stays."""
        with suppress(OSError):
            (self._beside("journal.jsonl") if self._parts else self.path).unlink()
            self._beside("manifest.json").unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()

    def _is_new(self) -> bool:
        return self._journal.is_empty() and not self._sealed()

    def _beside(self, name: str) -> Path:
        # Parquet readers skip names that begin with an underscore.
        return self._parts / f"_{name}" if self._parts else self.path.with_name(f"{self.path.name}.{name}")


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of the journal to Parquet's columns."""
    known = row["question_id"]
    return {
        **row,
        "question_id": known if known is None else _utf8(known if isinstance(known, str) else json.dumps(known)),
        "images": [_utf8(image) for image in row["images"]],
        "prompt": row["prompt"] and _utf8(row["prompt"]),
        "error": row["error"] and {name: _utf8(value) for name, value in row["error"].items()},
        **{name: list((row[name] or {}).items()) for name in ("usage", "timings")},
    }


def _utf8(text: str) -> str:
    """Escape lone surrogates, which JSON and file names may contain."""
    return text.encode(errors="backslashreplace").decode()
