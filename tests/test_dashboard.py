"""The Grafana dashboard and the service use the same metrics, labels included."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.commands.top import ONGOING, QUEUED
from deployments.metrics import EXPORTED_PREFIX, METRICS, Counter, Histogram

DASHBOARD = json.loads((Path(__file__).parents[1] / "cluster/grafana/llava-serve.json").read_text(encoding="utf-8"))
KNOWN = {EXPORTED_PREFIX + metric.name: metric for metric in (*METRICS, ONGOING, QUEUED)}
SERVES_LABELS = {"application", "deployment", "replica", "le"}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]


def _series(query: str) -> Iterator[tuple[str, str]]:
    """Yield every metric in a query, with the function around it."""
    for function, name in re.findall(r"(\w+)?(?: by \([\w, ]+\) )?\(?(\bray_\w+)\{", query):
        yield name, function


@pytest.mark.parametrize(("title", "target"), QUERIES, ids=[title for title, _ in QUERIES])
def test_every_query_names_existing_metrics_and_labels(title: str, target: dict[str, Any]) -> None:
    query = target["expr"]
    assert query.count("(") == query.count(")")
    series = list(_series(query))
    assert len(series) == query.count("ray_") > 0
    labels = set(SERVES_LABELS)
    for name, function in series:
        metric = KNOWN[name.removesuffix("_bucket")]
        labels.update(metric.labels)
        # Only histograms have buckets, and totals and buckets are meaningful only as rates.
        assert name.endswith("_bucket") == isinstance(metric, Histogram)
        assert (function == "rate") == isinstance(metric, Counter | Histogram), query
    for grouped in re.findall(r"by \(([\w, ]+)\)", query):
        assert set(grouped.split(", ")) <= labels
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    assert shown <= {label for grouped in re.findall(r"by \(([\w, ]+)\)", query) for label in grouped.split(", ")}


def test_every_metric_is_on_a_panel() -> None:
    named = {name.removesuffix("_bucket") for _, target in QUERIES for name, _ in _series(target["expr"])}
    assert named == set(KNOWN)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_documentation_has_every_metric_and_its_labels() -> None:
    text = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    section = text.split("\n### Metrics\n", 1)[1].split("\n### ", 1)[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `llava_")]
    documented = {
        name: tuple(filter(None, (label.strip() for label in labels.split(","))))
        for names, labels, _ in rows
        for name in re.findall(r"`(llava_\w+)`", names)
    }
    assert documented == {metric.name: metric.labels for metric in METRICS}
