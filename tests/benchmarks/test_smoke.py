"""The benchmarks run to completion and measure what they claim."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ports import free_port
from tests.deployments.service import started

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_short_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default settings, which fit every machine.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    figures = tmp_path / "figures.json"
    options = ["--port", str(free_port()), "--requests", "2", "--starts", "1", "--json", str(figures)]
    with started([sys.executable, "-m", "benchmarks", *options]) as (process, _):
        printed = process.communicate(timeout=350)[0].decode()
    assert process.returncode == 0, printed
    results = json.loads(figures.read_text())
    assert len(results["start_s"]) == 1
    assert results["service, 1 client"]["requests"] == 2
    assert results["service, 8 clients"]["requests"] == 4
    assert results["engine in process, 1 client"]["first_ms"] > 0
    # One request each: on a busy machine the overhead of the graph may be negative; the empty graph's time cannot.
    assert results["empty graph, 1 client"]["first_ms"] > 0
    assert isinstance(results["graph"]["added_over_empty"], float)


def run_module(module: str, folder: Path, *options: str) -> dict[str, Any]:
    figures = folder / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--json", str(figures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(figures.read_text())
    return results


def test_the_engine_is_measured_and_compared_with_transformers(tmp_path: Path) -> None:
    results = run_module("engine", tmp_path, "--size", "tiny", "--rounds", "1", "--threads", "1", "--shares")
    for work in ("1 request, new picture", "8 requests, new pictures", "8 requests, 2 pictures"):
        assert results[work]["engine"]["tokens_per_s"] > 0
        assert results[work]["transformers generate"]["tokens_per_s"] > 0

    shares = results["shares"]
    assert shares["bandwidth_gb_per_s"] > 0
    for work in ("decode, alone", "decode, many", "prefill", "tower"):
        assert shares[work]["floor_ms"] > 0
        assert shares[work]["engine_ms"] > 0
        assert shares[work]["transformers_ms"] > 0


def test_a_short_soak_fails_no_request(tmp_path: Path) -> None:
    results = run_module("soak", tmp_path, "--steps", "400")
    assert results["finished"] > 0
    assert results["failed"] == 0
    assert len(results["resident_mib"]) == 20
