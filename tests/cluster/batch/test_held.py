"""Failures are held back until another row shows that the rows themselves are at fault."""

import pytest

from cluster.batch.errors import JobError
from cluster.batch.held import HeldBack
from cluster.batch.records import UNREADABLE, Answer, Failure, Record
from llava_core.types import Usage

ANSWER = Answer("A cat.", (1,), "stop", Usage(1, 1))
BROKEN = Failure("engine_error", "no device")
DOUBTFUL = Failure(UNREADABLE, "a.png cannot be read", is_certain=False)
CERTAIN = Failure(UNREADABLE, "b.png cannot be read")


def record(value: Answer | Failure, *images: str) -> Record:
    return Record(0, value, images=images)


def test_an_engine_failure_is_held_until_an_answer() -> None:
    held, failed, answered = HeldBack(), record(BROKEN), record(ANSWER)
    assert held.take([failed]) == ([], [])
    assert held.take([record(CERTAIN, "b.png")]) == ([], [record(CERTAIN, "b.png")])
    assert held.take([answered]) == ([failed], [answered])
    assert held.take([failed]) == ([], [])
    assert held.rest() == ([failed], [])


@pytest.mark.parametrize(
    ("following", "is_proof"),
    [
        (record(ANSWER, "b.png"), True),
        (record(Failure("invalid_image", "broken"), "b.png"), True),
        (record(CERTAIN, "b.png"), True),
        (record(ANSWER), False),
        (record(ANSWER, ""), False),
        (record(Failure("invalid_row", "no JSON")), False),
    ],
)
def test_an_unreadable_picture_is_held_until_another_is_read(following: Record, is_proof: bool) -> None:  # noqa: FBT001
    held, doubtful = HeldBack(), record(DOUBTFUL, "a.png")
    assert held.take([doubtful]) == ([], [])
    assert held.take([following]) == ([], [*([doubtful] if is_proof else []), following])
    assert held.rest() == ([], [] if is_proof else [doubtful])


def test_too_many_consecutive_failures_end_the_job_with_their_cause() -> None:
    for value, message in (
        (BROKEN, "no device"),
        (DOUBTFUL, r"none of the first 201 pictures .* a\.png cannot be read"),
    ):
        held = HeldBack()
        held.take([record(value, "a.png")] * 200)
        with pytest.raises(JobError, match=message):
            held.take([record(value, "a.png")])


def test_failures_released_by_a_proof_do_not_count() -> None:
    held = HeldBack()
    for _ in range(3):
        held.take([record(DOUBTFUL, "a.png")] * 150)
        held.take([record(ANSWER, "b.png")])
    assert held.take([record(CERTAIN, "b.png")] * 1000) == ([], [record(CERTAIN, "b.png")] * 1000)
