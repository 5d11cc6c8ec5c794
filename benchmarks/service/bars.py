"""A bar: something measured, and the limit it must keep. A run fails when one of its bars does. Measures nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_KEEPS = {"≤": operator.le, "≥": operator.ge, "=": operator.eq, "<": operator.lt}


@dataclass(frozen=True)
class Bar:
    """A `measured` value, how it must compare with the `limit`, and the unit."""

    what: str
    measured: float
    sense: Literal["≤", "≥", "=", "<"]
    limit: float
    unit: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the bar is kept. NaN keeps none."""
        return bool(_KEEPS[self.sense](self.measured, self.limit))

    def as_json(self) -> dict[str, Any]:
        return {
            "measured": round(self.measured, 4),
            "bar": f"{self.sense} {self.limit:g} {self.unit}".strip(),
            "is_kept": self.is_kept,
        }


def make_table(bars: Sequence[Bar]) -> str:
    """Build a Markdown table."""
    rows = [("what", "measured", "bar", ""), ("---", "---:", "---:", "---")]
    for bar in bars:
        unit = f" {bar.unit}" if bar.unit else ""
        kept = "" if bar.is_kept else "**not kept**"
        rows.append((bar.what, f"{bar.measured:.4g}{unit}", f"{bar.sense} {bar.limit:g}{unit}", kept))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
