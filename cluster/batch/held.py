"""Failures that may not be the row's fault: held back until another row's success shows that they were.

When something that rows share goes away, such as an engine or a volume of pictures, row after row fails. Knows only
records.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.batch.errors import JobError
from cluster.batch.records import Answer, Failure, Record

_ENGINE_ERROR = "engine_error"
# More consecutive failures than this are not the rows' fault.
_MAX_FAILED_IN_A_ROW = 200


class HeldBack:
    """The failed rows of one pass, in order of arrival."""

    def __init__(self) -> None:
        self._engine: list[Record] = []
        self._pictures: list[Record] = []

    def take(self, block: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        """Return the rows whose outcome is now certain: those that failed in an engine, and all others. Raises JobError
        where too many have failed in a row; none of those has been returned."""
        failed, done = list[Record](), list[Record]()
        if any(isinstance(record.value, Answer) for record in block):
            failed, self._engine = self._engine, []
        if any(_has_been_read(record) for record in block):
            done, self._pictures = self._pictures, []
        self._engine += filter(_has_failed, block)
        self._pictures += filter(_is_uncertain, block)
        if len(self._engine) > _MAX_FAILED_IN_A_ROW:
            raise JobError(
                f"{len(self._engine)} rows in a row have failed alike, most recently with: {self._engine[-1].value}"
            )
        if len(self._pictures) > _MAX_FAILED_IN_A_ROW:
            last = self._pictures[-1].value
            assert isinstance(last, Failure)
            raise JobError(
                f"none of the first {len(self._pictures)} pictures can be read, most recently: {last.message}. Is "
                "--image-folder right, and does every machine see it? None of them is written as an error; once they "
                "can be read, the same command resumes"
            )
        return failed, done + [record for record in block if not (_has_failed(record) or _is_uncertain(record))]

    def rest(self) -> tuple[list[Record], list[Record]]:
        """Return what is still held, like `take`, when no more rows will come: too few failures to blame anything but
        the rows."""
        return self._engine, self._pictures


def _has_failed(record: Record) -> bool:
    """Whether the row failed in an engine, which may be its own or the engine's fault."""
    return isinstance(record.value, Failure) and record.value.kind == _ENGINE_ERROR


def _is_uncertain(record: Record) -> bool:
    return isinstance(record.value, Failure) and not record.value.is_certain


def _has_been_read(record: Record) -> bool:
    """Whether the row shows that pictures can be read: it names files, and is not itself in doubt."""
    return any(record.images) and not _is_uncertain(record)
