"""`python -m benchmarks` runs to its end and measures what it says."""

import json
import sys
from pathlib import Path

import pytest

from tests.deployments.service import free_port, started

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_short_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its own settings are the defaults, which fit every machine.
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
    assert results["graph"]["added_over_empty"] > 0
