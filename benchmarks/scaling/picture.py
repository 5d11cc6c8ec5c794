"""Draws a run: load, replicas and nodes, and times to the first token, over a common time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.scaling.watch import Sample

STAGES = {"Preprocessor": "preprocessor", "VisionEncoder": "vision encoder", "Generator": "generator"}


def draw(path: Path, samples: Sequence[Sample], firsts: Sequence[tuple[float, float]]) -> None:
    """Draw the run. `firsts` has, for each request, when it began by time.time, and the seconds to its first token."""
    # Keep text as text, and make the file reproducible from the same figures.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling"})
    start = samples[0].when
    times = [sample.when - start for sample in samples]
    figure, (load, replicas, latency) = plt.subplots(3, sharex=True, figsize=(9, 7.5), layout="constrained")
    load.fill_between(times, [sample.clients for sample in samples], step="post", alpha=0.3)
    load.set_ylabel("clients")
    for name, label in STAGES.items():
        replicas.step(times, [sample.running.get(name, 0) for sample in samples], where="post", label=label)
    nodes = [sample.nodes for sample in samples]
    replicas.step(times, nodes, where="post", label="nodes", color="black", linestyle=":")
    replicas.set_ylabel("running replicas, nodes")
    replicas.yaxis.get_major_locator().set_params(integer=True)
    replicas.legend(loc="upper right", frameon=False)
    latency.scatter([began - start for began, _ in firsts], [seconds for _, seconds in firsts], s=6, linewidths=0)
    latency.set(ylabel="first token after, s", xlabel="seconds", yscale="log")
    for axes in (load, replicas, latency):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
