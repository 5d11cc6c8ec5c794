"""`llava page` in front of `llava serve`, end to end: the default model's answer in a real browser, and a browser
that is closed while a model writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.ports import free_port
from deployments.commands.top import read_page
from deployments.metrics import CANCELLATIONS
from deployments.page.examples import EXAMPLES
from tests.deployments.page.browsing import browsing, serving_page
from tests.deployments.service import interrupt, llava, read_until, started, until
from tests.tiny import build_reference_model, write_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.browser, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The addresses of the page and of the metrics."""
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    endless = _endless_checkpoint(folder)
    stages = {stage: {"num_cpus": 0.05} for stage in ("gateway", "preprocessor", "vision_encoder", "generator")}
    models = [{"name": "scenes-llava"}, {"name": "endless", "checkpoint": str(endless)}]
    application = {"name": "llava", "route_prefix": "/", "import_path": "deployments.app:build_app"}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [{**application, "args": {"models": models, **stages}}]}))
    with started(llava("serve", "--config", str(config), "--port", str(port))) as (process, _):
        printed = read_until(process, "  logs ")
        metrics = next(line.split()[-1] for line in printed.splitlines() if line.startswith("  metrics "))
        with serving_page(f"http://127.0.0.1:{port}") as page:
            yield page, metrics
        interrupt(process)


def _endless_checkpoint(folder: Path) -> Path:
    """Write a checkpoint with so many layers that a long answer takes minutes, and that never ends one greedily."""
    model = build_reference_model(num_layers=32, context_length=8192)
    with torch.no_grad():
        # Some other token always has a logit above 0.
        model.lm_head.weight[model.config.text_config.eos_token_id] = 0
    return write_checkpoint(folder / "endless", model)


def test_the_default_model_answers_about_an_example(service: tuple[str, str]) -> None:
    url, _ = service
    with browsing() as browser:
        browser.open(url)
        browser.until_ready()
        assert browser.text(".status") == "scenes-llava is ready"
        browser.one("#talk .example").click()
        browser.until_shown("tokens/s")
        shown = browser.text("#talk .bot")
        assert "green circle" in shown
        assert "PAN" in shown
        for stage in ("preprocess", "encode", "prefill", "decode"):
            assert f"{stage} " in shown
        # The default model takes one picture at a time.
        browser.until_idle()
        browser.press("Clear")
        browser.one("#talk .example")
        browser.upload(EXAMPLES[2].pictures[0])
        browser.type("What does the text say?\n")
        browser.until_shown("CUP")


def test_closing_the_browser_cancels_its_request_at_the_gateway(service: tuple[str, str]) -> None:
    url, metrics = service
    assert read_page(metrics).total(CANCELLATIONS) == 0
    with browsing() as browser:
        browser.open(f"{url}/?model=endless")
        browser.until_shown("endless is ready", ".status")
        browser.one("#settings .toggle-button").click()
        most = browser.one('#settings input[aria-label="number input for Longest answer in tokens"]')
        browser.until(most.is_displayed)
        most.clear()
        most.send_keys("4096\t")
        browser.type("Go on.\n")
        # An answer's bubble is shown before the service is asked; its text is not.
        browser.until(lambda: browser.text("#talk .bot"))
    until(lambda: read_page(metrics).total(CANCELLATIONS) == 1)
