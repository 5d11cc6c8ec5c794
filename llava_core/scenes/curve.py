"""Draws the loss curves of the recipe's stages as one picture. Knows numbers only."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Curve = list[tuple[float, float]]


def draw_curves(curves: dict[str, Curve], path: Path) -> None:
    """One panel per stage: training loss over optimizer steps, both axes labelled, loss on a logarithmic scale."""
    size = (3.6 * len(curves), 3)
    figure, panels = pyplot.subplots(1, len(curves), figsize=size, layout="constrained", squeeze=False)
    for panel, (name, curve) in zip(panels[0], curves.items(), strict=True):
        panel.plot([step for step, _ in curve], [loss for _, loss in curve], linewidth=1.2)
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        panel.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
