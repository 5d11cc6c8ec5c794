"""What travels between the stages of a bulk job: a row of the input, and what has become of it so far.

A row that went wrong travels on as its failure, to be written like the others. In Ray's blocks a record is one pickled
value, because tiles, features and answers have no columns in common.
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
    """What was written about a row."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Failure:
    """Why there is no answer: a stable kind, and the cause in words. Not `is_certain`: it may be the fault of something
    that rows share."""

    kind: str
    message: str
    is_certain: bool = True


# Of a failure that is the input's and no row's: it travels in place of the rows that could not be read, and ends the
# job.
INPUT_ERROR = "input_error"
# What llava_core calls a picture's file that cannot be read.
UNREADABLE = "unreadable_file"


@dataclass(frozen=True)
class EngineReading:
    """What one generator's engine has counted since its start, and how many answers were in its last step."""

    replica: str
    num_steps: int
    scheduled_requests: int
    step_seconds: float
    output_tokens: int


@dataclass(frozen=True)
class Record:
    """Row number `row` of the input, from 0, and its value. `id`, `images` and `prompt` say which row it was."""

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
    """A caller's mistake has a code of its own."""
    return Failure(error.code if isinstance(error, RequestError) else "engine_error", str(error))


def to_block(records: Iterable[Record]) -> Block:
    """As Ray Data has them."""
    rows = list(records)
    pickled = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in rows]
    return pa.table({"row": [record.row for record in rows], "record": pickled}, schema=_SCHEMA)


def from_block(block: Block) -> Iterator[Record]:
    """One after the other, so that a block of features is there once."""
    for value in block.column("record"):
        yield pickle.loads(value.as_buffer())
