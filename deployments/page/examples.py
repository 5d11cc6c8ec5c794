"""Example questions, about pictures drawn for this project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PICTURES = Path(__file__).parent / "pictures"


@dataclass(frozen=True)
class Example:
    """A question about pictures."""

    question: str
    pictures: tuple[Path, ...]


EXAMPLES = (
    Example("Describe the picture.", (_PICTURES.parents[1] / "scene.png",)),
    Example("How many shapes are there?", (_PICTURES / "shapes.png",)),
    Example("What does the text say?", (_PICTURES / "sign.png",)),
)
