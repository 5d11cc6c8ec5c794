"""A job's progress, for people: one line rewritten in place on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from cluster.batch.report import Report

_TERMINAL_S, _ELSEWHERE_S = 0.5, 30.0
# After this long without a row, the line says what the job waits for.
_PATIENCE_S = 60.0
# Samples that a rate is computed over.
_WINDOW = 40


class Progress:
    """Samples a report from its own thread, so that a stalled job still reports."""

    def __init__(
        self, report: Report, to: TextIO, waits_for: Callable[[], str], *, now: Callable[[], float] = time.monotonic
    ) -> None:
        """`waits_for` says in words what the job waits for; it is called while no rows arrive."""
        self._report, self._to, self._waits_for, self._now = report, to, waits_for, now
        self._is_terminal = to.isatty()
        self._looks = [(now(), report.done)]
        self._last_row = now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._is_terminal:
            self._to.write("\r\x1b[K")
            self._to.flush()

    def line(self) -> str:
        """Return the rows done, their rate and the time left at that rate."""
        if self._report.done != self._looks[-1][1]:
            self._last_row = self._now()
        self._looks = [*self._looks[-_WINDOW:], (self._now(), self._report.done)]
        (began, before), (now, done) = self._looks[0], self._looks[-1]
        rate = (done - before) / (now - began) if now > began else 0.0
        total, errors = self._report.num_rows, self._report.errors.total()
        said = f"{done} of {total} rows ({done / max(1, total):.1%}), {errors} errors, {rate:.1f} rows per second"
        if now - self._last_row >= _PATIENCE_S:
            return f"{said}, {self._waits_for()}"
        return (
            f"{said}, {duration((total - done) / rate)} left" if rate else f"{said}, the stages are starting or waiting"
        )

    def _run(self) -> None:
        while not self._ended.wait(_TERMINAL_S if self._is_terminal else _ELSEWHERE_S):
            self._to.write(f"\r\x1b[K{self.line()}" if self._is_terminal else f"{self.line()}\n")
            self._to.flush()


def duration(seconds: float) -> str:
    """Format seconds, such as 2:03:04."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}"
