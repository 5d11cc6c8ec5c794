"""The recorded progress of answers in flight."""

import pickle

from deployments.graph.progress import Progress
from llava_core.types import BegunAnswer, TokenDelta


def test_nothing_has_begun_at_first() -> None:
    assert Progress(2).begun == ()


def test_tokens_are_collected_per_answer_and_snapshots_do_not_change() -> None:
    progress = Progress(3)
    progress.note(TokenDelta("id", "a", (1, 2), index=2))
    progress.note(TokenDelta("id", "b", (3,), index=0))
    before = progress.begun
    progress.note(TokenDelta("id", "c", (70_000,), "stop", index=2))
    assert _plain(before) == [([3], False), ([], False), ([1, 2], False)]
    assert _plain(progress.begun) == [([3], False), ([], False), ([1, 2, 70_000], True)]
    assert pickle.loads(pickle.dumps(progress.begun)) == progress.begun


def _plain(begun: tuple[BegunAnswer, ...]) -> list[tuple[list[int], bool]]:
    return [([*answer.token_ids], answer.is_over) for answer in begun]
