"""Progress shows how far a job is, its rate and the time left."""

import io
import threading

import pytest

from cluster.batch import progress as progress_module
from cluster.batch.progress import Progress, duration
from cluster.batch.report import Report


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_are_based_on_recent_rows() -> None:
    report, clock = Report(1000), Clock()
    progress = Progress(report, io.StringIO(), lambda: "nothing", now=clock)
    clock.now = 10.0
    assert progress.line().endswith("0 errors, 0.0 rows per second, the stages are starting or waiting")
    report.answered, clock.now = 99, 20.0
    report.errors["invalid_image"] = 1
    assert progress.line() == "100 of 1000 rows (10.0%), 1 errors, 5.0 rows per second, 0:03:00 left"


def test_after_a_minute_without_a_row_the_cause_is_shown() -> None:
    report, clock = Report(10), Clock()
    progress = Progress(report, io.StringIO(), lambda: "no CPU is free", now=clock)
    clock.now = 59.0
    assert "no CPU" not in progress.line()
    report.answered, clock.now = 1, 60.0
    assert "no CPU" not in progress.line()
    clock.now = 119.0
    assert "no CPU" not in progress.line()
    clock.now = 120.0
    assert progress.line().endswith("rows per second, no CPU is free")


def test_without_a_terminal_a_line_is_printed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_ELSEWHERE_S", 0.01)
    written = threading.Event()

    class Log(io.StringIO):
        def flush(self) -> None:
            written.set()

    log = Log()
    with Progress(Report(5), log, lambda: "nothing"):
        assert written.wait(30)
    assert log.getvalue().startswith("0 of 5 rows (0.0%), 0 errors")
    assert "\r" not in log.getvalue()


def test_on_a_terminal_one_line_is_overwritten_and_finally_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with Progress(Report(5), terminal, lambda: "nothing"):
        pass
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert "\n" not in terminal.getvalue()


def test_durations_are_formatted_as_clock_times() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3723, 360_000)] == ["0:00:00", "0:01:01", "1:02:03", "100:00:00"]
