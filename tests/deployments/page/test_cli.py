"""`llava page` from its command line: options become settings, and a mistake is reported in one line."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from deployments.page import web
from deployments.page.settings import LogArgs, PageArgs
from llava_core.cli import main


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(web, "serve_page", lambda *given: served.append(given))
    words = tmp_path / "consent.txt"
    words.write_text("Our words.")
    options = ["--log", str(tmp_path / "log"), "--log-days", "7", "--log-pictures", "--consent", str(words)]
    result = CliRunner().invoke(main, ["page", "--url", "http://there:1", "--port", "9000", *options])
    assert result.exit_code == 0, result.output
    assert "http://127.0.0.1:9000/" in result.output
    log = LogArgs(folder=tmp_path / "log", days=7, pictures=True, consent="Our words.")
    assert served == [(PageArgs(url="http://there:1", log=log), "127.0.0.1", 9000)]
    CliRunner().invoke(main, ["page"])
    assert served[1:] == [(PageArgs(), "127.0.0.1", 7860)]


def test_an_exposed_page_does_not_start_by_accident() -> None:
    result = CliRunner().invoke(main, ["page", "--host", "0.0.0.0"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: the page would listen on 0.0.0.0")
