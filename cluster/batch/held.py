"""Failures that may be no row's fault: held back until another row shows that it was theirs.

What rows share, an engine or a volume with pictures, fails one after the other when it goes away. Knows records alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.batch.errors import JobError
from cluster.batch.records import Answer, Failure, Record

_ENGINE_ERROR = "engine_error"
# So many in a row are no row's fault.
_MAX_FAILED_IN_A_ROW = 200


class HeldBack:
    """Failed rows of one pass, in the order in which they came."""

    def __init__(self) -> None:
        self._engine: list[Record] = []
        self._pictures: list[Record] = []

    def take(self, block: Sequence[Record]) -> tuple[list[Record], list[Record]]:
        """Rows that have failed in an engine, and all others, that are what they are from now on. Raises JobError where
        too many in a row have failed, of which none was told then."""
        failed, done = list[Record](), list[Record]()
        if any(isinstance(record.value, Answer) for record in block):
            failed, self._engine = self._engine, []
        if any(_has_been_read(record) for record in block):
            done, self._pictures = self._pictures, []
        self._engine += filter(_has_failed, block)
        self._pictures += filter(_is_uncertain, block)
        if len(self._engine) > _MAX_FAILED_IN_A_ROW:
            raise JobError(
                f"{len(self._engine)} rows in a row have failed alike, the last so: {self._engine[-1].value}"
            )
        if len(self._pictures) > _MAX_FAILED_IN_A_ROW:
            last = self._pictures[-1].value
            assert isinstance(last, Failure)
            raise JobError(
                f"none of the first {len(self._pictures)} pictures can be read, the last so: {last.message}. Is their "
                "--image-folder right, and does every machine see it? None is written off; where they are there again, "
                "the same command goes on"
            )
        return failed, done + [record for record in block if not (_has_failed(record) or _is_uncertain(record))]

    def rest(self) -> tuple[list[Record], list[Record]]:
        """As `take`, when no other rows will come: too few to blame anything else."""
        return self._engine, self._pictures


def _has_failed(record: Record) -> bool:
    """In an engine, which may be its own or the engine's fault."""
    return isinstance(record.value, Failure) and record.value.kind == _ENGINE_ERROR


def _is_uncertain(record: Record) -> bool:
    return isinstance(record.value, Failure) and not record.value.is_certain


def _has_been_read(record: Record) -> bool:
    """Whether the row shows that pictures can be read: it names files, and is not itself in doubt."""
    return any(record.images) and not _is_uncertain(record)
