"""What the command writes and where, without measuring anything."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers.report import BEGIN, END
from tests.benchmarks.peers.test_report import results


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["peers", *map(str, options)])
    command.main()


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "README.md"
    file.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(command, "README", file)
    return file


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the sizes that were measured; measuring the last one fails."""
    sizes: list[str] = []

    def measure(size: str, *_: Any) -> Any:
        sizes.append(size)
        if size == "mid":
            raise SystemExit("no memory")
        return results()["sizes"]["mid"]

    monkeypatch.setattr(command, "make_contenders", lambda _: [])
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "measure_size", measure)
    monkeypatch.setattr(command, "measure_engine", lambda *_: {"engine": 1})
    return sizes


def test_json_and_readme_are_written(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tmp_path / "figures.json"
    run(monkeypatch, "--vllm-venv", tmp_path, "--sizes", "tiny", "--json", figures, "--readme")
    found = json.loads(figures.read_text())
    assert found["machine"]["cores"] > 0
    assert found["engine in process"] == {"tiny": {"engine": 1}}
    text = readme.read_text()
    assert "`tiny`, 1 client, new pictures" in text
    readme.write_text(f"{BEGIN}\n{END}\n")
    run(monkeypatch, "--table", figures)
    assert readme.read_text() == text


def test_measured_sizes_are_kept_when_another_fails(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = tmp_path / "figures.json"
    with pytest.raises(SystemExit, match="no memory"):
        run(monkeypatch, "--vllm-venv", tmp_path, "--json", figures)
    assert measured == ["tiny", "mid"]
    assert json.loads(figures.read_text())["sizes"].keys() == {"tiny"}


def test_memory_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command._NEEDED_GIB, "mid", 10**6)
    with pytest.raises(SystemExit, match="mid needs 1000000 GiB"):
        command.check_memory("mid")
