"""What travels between the stages of a bulk job: a row of the input and its state so far.

A failed row travels on as its failure and is written like the others. In Ray's blocks a record is one pickled value,
because tiles, features and answers have no columns in common.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import pyarrow as pa

from llava_core.errors import LlavaError, RequestError
from llava_core.questions import Question
from llava_core.types import EngineRequest, FinishReason, PreparedRequest, StageTimes, Usage

Block: TypeAlias = pa.Table
_SCHEMA = pa.schema([("row", pa.int64()), ("record", pa.large_binary())])


@dataclass(frozen=True)
class Answer:
    """The generated answer to a row."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Failure:
    """Why there is no answer: a stable kind, and the cause in words. Without `is_certain`, something that rows share
    may be at fault instead of this row."""

    kind: str
    message: str
    is_certain: bool = True


# The kind of a failure of the input itself rather than of a row: it travels in place of the rows that could not be
# read, and ends the job.
INPUT_ERROR = "input_error"
# llava_core's code for a picture file that cannot be read.
UNREADABLE = "unreadable_file"


@dataclass(frozen=True)
class EngineReading:
    """What one generator's engine has counted since its start."""

    replica: str
    num_steps: int
    scheduled_requests: int
    step_seconds: float
    output_tokens: int


@dataclass(frozen=True)
class Record:
    """Row number `row` of the input, from 0, and its value. `id`, `images` and `prompt` identify the row."""

    row: int
    value: Question | PreparedRequest | EngineRequest | Answer | Failure = field(repr=False)
    id: object = None
    images: tuple[str, ...] = ()
    prompt: str | None = field(default=None, repr=False)
    timings: StageTimes = field(default_factory=dict)
    reading: EngineReading | None = None

    def became(self, value: PreparedRequest | EngineRequest | Answer | Failure, **ms: float) -> Record:
        """The same row, one stage further."""
        return replace(self, value=value, timings={**self.timings, **ms})


def failure(error: LlavaError) -> Failure:
    """Turn an error into a failure; a RequestError keeps its own code as the kind."""
    return Failure(error.code if isinstance(error, RequestError) else "engine_error", str(error))


def to_block(records: Iterable[Record]) -> Block:
    """Pack records into a block of Ray Data."""
    rows = list(records)
    pickled = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in rows]
    return pa.table({"row": [record.row for record in rows], "record": pickled}, schema=_SCHEMA)


def from_block(block: Block) -> Iterator[Record]:
    """Yield records one at a time, so that a block of features is in memory only once."""
    for value in block.column("record"):
        yield pickle.loads(value.as_buffer())
