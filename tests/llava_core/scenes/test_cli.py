"""`llava default-model`: a drawn scene, an accuracy table, and a file of wrong answers on request."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from llava_core.evaluation.task import Answer, Sample
from llava_core.scenes import cli
from llava_core.scenes.cli import default_model
from llava_core.scenes.questions import MAKERS


def run(*arguments: str) -> str:
    result = CliRunner().invoke(default_model, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_drawn_scene_comes_with_questions_and_answers(tmp_path: Path) -> None:
    first = run("draw", str(tmp_path / "a.png"), "--seed", "4")
    assert first == run("draw", str(tmp_path / "b.png"), "--seed", "4")
    assert all(line.split()[0] in MAKERS for line in first.splitlines())
    with Image.open(tmp_path / "a.png") as picture:
        assert 300 <= max(picture.size) <= 800
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


class KnowsEverythingButReading:
    """Answers every question correctly except those about what a text says."""

    def answer(self, samples: Sequence[Sample]) -> Iterator[Answer]:
        return (Answer(sample, "?" if sample.kind == "read" else sample.expected) for sample in samples)


def test_an_evaluation_prints_a_row_per_kind_and_saves_wrong_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_answerer", lambda _model, _url: KnowsEverythingButReading())
    wrong = tmp_path / "wrong.jsonl"
    out = run("evaluate", "--questions", "9", "--errors", str(wrong))
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(MAKERS) + 1
    assert all(any(f"| {kind} | 1 |" in row for row in rows) for kind in MAKERS)
    missed = [json.loads(line) for line in wrong.read_text().splitlines()]
    assert [row["kind"] for row in missed] == ["read"]
    assert set(missed[0]) == {"kind", "question", "expected", "answer"}


def test_an_output_that_cannot_be_written_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_answerer", lambda *_: pytest.fail("nothing may be answered"))
    for arguments in (
        ["evaluate", "--errors", str(tmp_path / "none/wrong.jsonl")],
        ["draw", str(tmp_path / "none/a.png")],
        ["draw", str(tmp_path / "a.unknown")],
    ):
        result = CliRunner().invoke(cli.default_model, arguments)
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)
        assert str(tmp_path) in result.output
