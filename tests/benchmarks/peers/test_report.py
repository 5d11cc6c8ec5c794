"""The README's table, made from the benchmark's JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.compare import COMPARED, summary
from benchmarks.peers.contenders import OURS, TRANSFORMERS, VLLM
from benchmarks.peers.report import BEGIN, END, make_section, make_table, rewrite

ROOT = Path(__file__).parents[3]


def results() -> dict[str, Any]:
    measured = {OURS: (1500.0, 0.0), VLLM: (1000.0, 0.042), TRANSFORMERS: (3000.0, 0.038)}
    rounds = {
        name: [{**dict.fromkeys(COMPARED, value), "cpu_idle_servers": idle}] for name, (value, idle) in measured.items()
    }
    limits = {"first_ms_p50": 700.0, "token_ms_p50": 20.5, "tokens_per_s": 40.0}
    works = {"1 client, new pictures": {"floor": limits, **summary(rounds)}}
    return {
        "machine": {"processor": "A processor", "cores": 2},
        "versions": {OURS: "0.1.0", VLLM: "0.32.0+cpu", TRANSFORMERS: "5.23.0"},
        "rounds": 3,
        "sizes": {"mid": {"works": works}},
    }


def words(found: dict[str, Any]) -> str:
    return " ".join(make_section(found).split())


def test_each_server_has_a_row_with_ratios_and_the_floor_comes_last() -> None:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in make_table(results()).splitlines()]
    assert len({len(row) for row in rows}) == 1
    names = [row[1] for row in rows[2:]]
    assert names == [OURS, VLLM, TRANSFORMERS, "*floor*"]
    assert [row[0] for row in rows[2:]] == ["`mid`, 1 client, new pictures", "", "", ""]
    assert [row[2] for row in rows[2:]] == ["1,500", "1,000 (1.50)", "3,000 (0.50)", "≥ 700"]
    assert rows[-1][-2:] == ["", "≤ 40.0"]


def test_the_section_names_machine_versions_and_any_engine_figures() -> None:
    found = results()
    assert "2 cores of A processor; vLLM 0.32.0+cpu, transformers serve 5.23.0; medians of 3 rounds" in words(found)
    assert "took up to 4% of the cores" in words(found)
    figures = {"engine": {"tokens_per_s": 60.0}, "transformers generate": {"tokens_per_s": 30.5}}
    found["engine in process"] = {"mid": {"8 requests, new pictures": figures}}
    assert "60 tokens per second; transformers' `generate` in one batch: 30.5." in words(found)


def test_a_small_models_processor_time_is_reported_by_process() -> None:
    found = results()
    assert "processor time" not in words(found)
    spent = {"cpu_ms_per_request_Ray": 4.0, "cpu_ms_per_request_Generator": 20.4, "cpu_ms_per_request_haproxy": 0.3}
    (work,) = results()["sizes"]["mid"]["works"].values()
    work[OURS] |= spent
    found["sizes"]["tiny"] = {"works": {"32 clients, new pictures": work}}
    assert "with 32 clients: Generator 20, Ray 4; in all 25." in words(found)


def test_only_the_text_between_the_marks_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    rewrite(readme, json.loads(json.dumps(results())))
    once = readme.read_text()
    assert once == f"before\n{BEGIN}\n{make_section(results())}\n{END}\nafter\n"
    rewrite(readme, results())
    assert readme.read_text() == once


@pytest.mark.parametrize("text", ["nothing", f"{END} {BEGIN}"])
def test_a_readme_without_marks_is_left_unchanged(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit, match="peers:begin"):
        rewrite(readme, results())
    assert readme.read_text() == text


def test_the_readme_has_each_mark_once() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)
