"""What the command writes, and that it fails with its bars, without measuring anything."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.service import __main__ as command
from benchmarks.service.bars import Bar


def run(monkeypatch: pytest.MonkeyPatch, work: str, bar: Bar, *options: str) -> dict[str, Any]:
    """Return the arguments that the work got."""
    got: dict[str, Any] = {}

    def measure(*positional: Any, **named: Any) -> Any:
        got.update(named, positional=positional)
        return [bar], {"more": [1]}

    monkeypatch.setattr(getattr(command, work), "run", measure)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["service", work, *options])
    command.main()
    return got


@pytest.mark.parametrize("work", ["mixed", "burst", "repeated", "share"])
def test_every_work_is_run_and_recorded(
    work: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "figures.json"
    run(monkeypatch, work, Bar("errors", 0, "=", 0), "--json", str(found))
    results = json.loads(found.read_text())
    assert results["work"] == work
    assert results["machine"]["cores"] > 0
    assert results["bars"] == {"errors": {"measured": 0, "bar": "= 0", "is_kept": True}}
    assert results["more"] == [1]
    assert "| errors | 0 | = 0 |  |" in capsys.readouterr().out


def test_a_bar_that_is_not_kept_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "burst", Bar("errors", 1, "=", 0))


def test_options_reach_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Bar("errors", 0, "=", 0)
    got = run(monkeypatch, "mixed", kept, "--minutes", "2", "--clients", "3", "--pause-seconds", "4")
    assert got == {"positional": (2.0,), "clients": 3, "pause_s": 4.0, "seed": 0}
    assert run(monkeypatch, "share", kept, "--rounds", "1", "--mid", "a")["positional"] == (1, 32, Path("a"))
