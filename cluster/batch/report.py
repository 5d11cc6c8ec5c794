"""The results of a job: rows, errors by kind, tokens, time by stage, and how full the engines were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.batch.records import EngineReading

Row = Mapping[str, Any]


@dataclass
class Report:
    """Counts rows, including those of earlier runs of the same job; seconds and engines cover this run only.

    `stage_ms` sums the time rows spent in each stage: rows that share a stage's time each count it in full.
    """

    num_rows: int
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    image_tokens: int = 0
    stage_ms: Counter[str] = field(default_factory=Counter)
    rows_before: int = 0
    tokens_before: int = 0
    seconds: float = 0.0
    _engines: dict[str, EngineReading] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Rows with an answer or an error."""
        return self.answered + self.errors.total()

    def count(self, row: Row) -> None:
        """Count a row that was written."""
        for stage, ms in (row["timings"] or {}).items():
            self.stage_ms[stage] += ms
        if row["error"] is not None:
            self.errors[row["error"]["kind"]] += 1
            return
        self.answered += 1
        self.prompt_tokens += row["usage"]["prompt_tokens"]
        self.completion_tokens += row["usage"]["completion_tokens"]
        self.image_tokens += row["usage"]["image_tokens"]

    def begin(self) -> None:
        """Mark everything counted so far as the work of earlier runs."""
        self.rows_before, self.tokens_before = self.done, self.completion_tokens

    def read_engine(self, reading: EngineReading | None) -> None:
        """Keep the latest reading of each engine."""
        known = reading and self._engines.get(reading.replica)
        if reading is not None and (known is None or known.num_steps < reading.num_steps):
            self._engines[reading.replica] = reading

    def as_json(self) -> dict[str, Any]:
        """Return the report for a file."""
        tokens = self.completion_tokens - self.tokens_before
        return {
            "rows": self.num_rows,
            "done": self.done,
            "answered": self.answered,
            "errors": dict(self.errors),
            "tokens": {
                "prompt": self.prompt_tokens,
                "image": self.image_tokens,
                "completion": self.completion_tokens,
            },
            "stage_seconds": {stage: round(ms / 1e3, 3) for stage, ms in sorted(self.stage_ms.items())},
            "this_run": {
                "rows": self.done - self.rows_before,
                "seconds": round(self.seconds, 2),
                "completion_tokens": tokens,
                "tokens_per_second": round(tokens / self.seconds, 1) if self.seconds else None,
                "engines": [_engine(reading) for _, reading in sorted(self._engines.items())],
            },
        }

    def lines(self) -> list[str]:
        """Return the report for people."""
        run, errors = self.as_json()["this_run"], self.errors.most_common()
        said = [f"{self.done} of {self.num_rows} rows done: {self.answered} answered, {self.errors.total()} errors"]
        said += [f"  {number} x {kind}" for kind, number in errors]
        said.append(
            f"tokens: {self.prompt_tokens} read ({self.image_tokens} of pictures), {self.completion_tokens} written"
        )
        stages = ", ".join(f"{stage} {ms / 1e3:.1f} s" for stage, ms in sorted(self.stage_ms.items()))
        said.append(f"time of all rows by stage: {stages or 'none'}")
        if self.seconds:
            said.append(
                f"this run: {run['rows']} rows in {self.seconds:.1f} s, {run['tokens_per_second']} tokens per second"
            )
        said += [f"  engine {each['replica']}: {each['mean_batch']} answers in a step" for each in run["engines"]]
        return said


def _engine(reading: EngineReading) -> dict[str, Any]:
    return {
        "replica": reading.replica,
        "steps": reading.num_steps,
        "mean_batch": round(reading.scheduled_requests / max(1, reading.num_steps), 2),
        "step_seconds": round(reading.step_seconds, 2),
        "completion_tokens": reading.output_tokens,
    }
