"""The parts of an evaluation: samples, an Answerer that answers them, and a report of exact matches by kind.

Imports neither models nor engine: an Answerer may be a model in this process or an HTTP client.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """A question about one encoded picture, with its only right answer."""

    id: str
    kind: str
    question: str
    expected: str
    image: bytes = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """The answer to a sample."""

    sample: Sample
    text: str

    @property
    def is_right(self) -> bool:
        """Exact match after `normalise`."""
        return normalise(self.text) == normalise(self.sample.expected)


class Answerer(Protocol):
    """Anything that can answer samples; answers may come in any order."""

    def answer(self, samples: Sequence[Sample]) -> Iterator[Answer]:
        """Yield one Answer per sample, as they become available."""
        ...


@dataclass(frozen=True)
class Report:
    """Right and asked questions by kind."""

    right: dict[str, int]
    asked: dict[str, int]

    @property
    def accuracy(self) -> float:
        """Share of exact matches over all kinds, 0 to 1."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))

    def accuracy_of(self, kind: str) -> float:
        """Share of exact matches within one kind, 0 to 1."""
        return self.right.get(kind, 0) / self.asked[kind]

    def table(self) -> str:
        """A Markdown table, one row per kind and one for all."""
        rows = [("question type", "questions", "exact match")]
        rows += [(kind, str(self.asked[kind]), f"{100 * self.accuracy_of(kind):.1f} %") for kind in sorted(self.asked)]
        rows.append(("all", str(sum(self.asked.values())), f"{100 * self.accuracy:.1f} %"))
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], "| --- | ---: | ---: |", *lines[1:]])


def score(answers: Iterable[Answer]) -> Report:
    """Count exact matches by kind."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for answer in answers:
        asked[answer.sample.kind] += 1
        right[answer.sample.kind] += answer.is_right
    return Report(dict(right), dict(asked))


def normalise(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()
