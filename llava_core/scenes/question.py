"""A question: its kind, its text, and its only right answer in two forms. Plain data."""

from dataclasses import dataclass

SENTENCE_REQUESTS = ("Answer in a sentence.", "Answer in a full sentence.", "Reply with a full sentence.")
SHORT_REQUESTS = ("Answer the question using a single word or phrase.", "Answer briefly.", "Answer in one word.")


@dataclass(frozen=True)
class Question:
    """`kind` is the question type of the evaluation; `answer` the short answer, `sentence` the same as a sentence."""

    kind: str
    text: str
    answer: str
    sentence: str
