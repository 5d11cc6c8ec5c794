"""Pictures for loads: scenes of several sizes in several formats, from which new ones are derived in milliseconds.

Drawing a scene of some megapixels takes a tenth of a second, which a load's clients cannot spare; a patch of a new
colour makes it a picture that no cache has seen. Knows nothing about requests.
"""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from llava_core.scenes.draw import draw_scene
from llava_core.scenes.scene import sample_scene

# The longest side in pixels, and its share in percent: up to some megapixels, like scaled-down photos from phones.
SIDES = {64: 10, 200: 20, 336: 25, 640: 20, 1024: 15, 1600: 7, 2400: 3}
FORMATS = ("PNG", "JPEG", "WEBP")
_VARIANTS = 3


@dataclass(frozen=True)
class Picture:
    """An encoded picture, with its format's name."""

    data: bytes
    format: str

    @property
    def part(self) -> dict[str, object]:
        """The picture as a part of a message."""
        url = f"data:image/{self.format.lower()};base64,{base64.b64encode(self.data).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}


class PictureMaker:
    """Makes pictures; the same ones for the same seed."""

    def __init__(self, seed: object) -> None:
        self._chance = random.Random(f"pictures:{seed}")
        self._scenes = {
            side: [draw_scene(sample_scene(self._chance, longest_side=(side, side))) for _ in range(_VARIANTS)]
            for side in SIDES
        }

    def make(self, *, side: int | None = None) -> Picture:
        """Make a new picture of random format, and of random size unless its longest side is given, one of SIDES."""
        chance = self._chance
        if side is None:
            (side,) = chance.choices([*SIDES], [*SIDES.values()])
        image = chance.choice(self._scenes[side]).copy()
        _patch(image, chance)
        kind = chance.choice(FORMATS)
        buffer = io.BytesIO()
        options = {"PNG": {"compress_level": 1}, "JPEG": {"quality": 88}, "WEBP": {"quality": 85, "method": 0}}
        image.save(buffer, kind, **options[kind])
        return Picture(buffer.getvalue(), kind)


def _patch(image: Image.Image, chance: random.Random) -> None:
    """Draw a patch of an eighth of each side, so that it is visible at any resolution a model uses."""
    width, height = max(image.width // 8, 8), max(image.height // 8, 8)
    left, top = chance.randrange(image.width - width + 1), chance.randrange(image.height - height + 1)
    colour = tuple(chance.randrange(256) for _ in range(3))
    ImageDraw.Draw(image).rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
