"""Loss curves are drawn into a picture."""

from pathlib import Path

from PIL import Image

from llava_core.scenes.curve import draw_curves


def test_every_stage_gets_a_panel(tmp_path: Path) -> None:
    curve = [(1.0, 3.0), (2.0, 1.0), (3.0, 0.5)]
    draw_curves({"one": curve}, tmp_path / "one.png")
    draw_curves({"one": curve, "two": curve}, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width > 1.8 * one.width
        assert one.height == two.height
