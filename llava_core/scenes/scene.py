"""Scenes and how they are sampled: objects that do not overlap, in places with unambiguous names.

Geometry only, in pixels of the picture to be drawn. Knows nothing about drawing (draw.py) or language (questions.py).
"""

import math
import random
from dataclasses import dataclass

from llava_core.scenes.vocabulary import COLOURS, DIGITS, LETTERS, PLACES, PRINTED_WORDS, SHAPES, SIZES

Rgb = tuple[int, int, int]

# The mean of CLIP's normalisation, with which a picture is padded to a square. A similar background hides the frame.
PAD_COLOUR: Rgb = (122, 116, 104)

# Shares of the longer side below which things cover too few pixels of a tile to be recognised.
MIN_TEXT_HEIGHT = 0.11
MIN_DIAMETER = 0.1


@dataclass(frozen=True)
class SceneObject:
    """A shape with its centre (pixels), diameter (pixels), class names and the colour it is drawn in."""

    shape: str
    colour: str
    size: str
    place: str
    x: float
    y: float
    diameter: float
    rgb: Rgb


@dataclass(frozen=True)
class SceneText:
    """A printed word or number with the box (left, top, width, height in pixels) it must fill."""

    text: str
    place: str
    left: float
    top: float
    width: float
    height: float
    rgb: Rgb
    font: int

    @property
    def kind(self) -> str:
        """What the text is called: `number` when it is all digits, else `word`."""
        return "number" if self.text.isdigit() else "word"


@dataclass(frozen=True)
class Scene:
    """One picture: its size in pixels, background, objects in reading order, printed text if any, a drawing seed."""

    width: int
    height: int
    background: Rgb
    background_style: str
    objects: tuple[SceneObject, ...]
    text: SceneText | None
    seed: int


def sample_scene(
    rng: random.Random,
    *,
    longest_side: tuple[int, int] = (64, 1500),
    with_text: float = 0.42,
    random_letters: float = 0.34,
) -> Scene:
    """Sample a scene: 1 to 6 objects, any aspect up to 3:1; in the share `with_text`, a printed text if it fits.

    `random_letters` is the share of texts that are neither numbers nor words: reading them takes knowing the letters.
    """
    width, height = _sample_frame(rng, longest_side)
    background = _sample_background(rng)
    builder = _Builder(rng, width, height, background)
    if rng.random() < with_text:
        builder.place_text(_sample_text(rng, random_letters))
    has_medium = rng.random() < 0.2
    num_objects = rng.randint(1, 6)
    for _ in range(num_objects):
        builder.place_object(_sample_size(rng, num_objects=num_objects, has_medium=has_medium))
    if not builder.objects:
        return sample_scene(rng, longest_side=longest_side, with_text=with_text, random_letters=random_letters)
    return Scene(
        width=width,
        height=height,
        background=background,
        background_style=rng.choices(("plain", "noise", "gradient", "blotches"), (55, 20, 13, 12))[0],
        objects=tuple(sorted(builder.objects, key=reading_order)),
        text=builder.text,
        seed=rng.getrandbits(32),
    )


def reading_order(thing: SceneObject) -> tuple[int, float]:
    """Sort key: named places row by row, then left to right within one place."""
    names = [name for row in PLACES for name in row]
    return names.index(thing.place), thing.x


def _sample_frame(rng: random.Random, longest_side: tuple[int, int]) -> tuple[int, int]:
    low, high = longest_side
    longest = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    ratio = 1.0 if rng.random() < 0.35 else math.exp(rng.uniform(0, math.log(3 if rng.random() < 0.3 else 2)))
    shortest = max(round(longest / ratio), min(low, longest))
    return (longest, shortest) if rng.random() < 0.6 else (shortest, longest)


def _sample_size(rng: random.Random, *, num_objects: int, has_medium: bool) -> str:
    if has_medium and rng.random() < 0.4:
        return "medium"
    return "large" if rng.random() < (0.5 if num_objects <= 3 else 0.3) else "small"


def _sample_background(rng: random.Random) -> Rgb:
    while True:
        kind = rng.random()
        if kind < 0.25:
            level = rng.randint(235, 255)
            colour = (level, level, level)
        elif kind < 0.4:
            level = rng.randint(0, 255)
            colour = (level, level, level)
        elif kind < 0.55:
            colour = (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 60))
        elif kind < 0.85:
            colour = (rng.randint(170, 255), rng.randint(170, 255), rng.randint(170, 255))
        else:
            colour = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        if colour_distance(colour, PAD_COLOUR) > 30:
            return colour


def colour_distance(one: Rgb, other: Rgb) -> float:
    """Euclidean distance in RGB, 0 to 442."""
    return math.dist(one, other)


def _sample_colour(rng: random.Random, background: Rgb, *, distance: float) -> tuple[str, Rgb] | None:
    """A colour name and an RGB value that stands out from the background, or None after 20 tries."""
    for _ in range(20):
        name = rng.choice(list(COLOURS))
        red, green, blue = rng.choice(COLOURS[name])
        rgb = (_jitter(rng, red), _jitter(rng, green), _jitter(rng, blue))
        if colour_distance(rgb, background) > distance:
            return name, rgb
    return None


def _jitter(rng: random.Random, level: int) -> int:
    return min(255, max(0, level + rng.randint(-9, 9)))


def _sample_text(rng: random.Random, random_letters: float) -> str:
    kind = rng.random()
    if kind < (1 - random_letters) / 2:
        return "".join(rng.choices(DIGITS, k=rng.randint(1, 4)))
    if kind < 1 - random_letters:
        return rng.choice(PRINTED_WORDS)
    return "".join(rng.choices(LETTERS, k=rng.randint(2, 5)))


class _Builder:
    """Places things one after another so that nothing overlaps and every centre lies clearly inside a named place."""

    def __init__(self, rng: random.Random, width: int, height: int, background: Rgb) -> None:
        self.rng = rng
        self.width = width
        self.height = height
        self.background = background
        self.unit = math.sqrt(width * height)
        self.longest = max(width, height)
        self.objects: list[SceneObject] = []
        self.text: SceneText | None = None

    def place_text(self, text: str) -> None:
        height = self.longest * self.rng.uniform(0.115, 0.21)
        # A capital letter with its spacing is about 0.75 times as wide as high; narrow the box until it fits the frame.
        width = min(0.78 * height * len(text), 0.9 * self.width)
        height = width / (0.78 * len(text))
        if height < MIN_TEXT_HEIGHT * self.longest or height > 0.8 * self.height:
            return
        chosen = _sample_colour(self.rng, self.background, distance=130)
        spot = self._spot(width, height, margin=0.0)
        if chosen is None or spot is None:
            return
        x, y, place = spot
        self.text = SceneText(
            text, place, x - width / 2, y - height / 2, width, height, chosen[1], self.rng.getrandbits(16)
        )

    def place_object(self, size: str) -> None:
        low, high = SIZES[size]
        for _ in range(40):
            smallest = max(low, min(high, MIN_DIAMETER * self.longest / self.unit))
            diameter = self.unit * self.rng.uniform(smallest, high)
            chosen = _sample_colour(self.rng, self.background, distance=90)
            spot = self._spot(diameter, diameter, margin=0.03)
            if chosen is None or spot is None:
                continue
            x, y, place = spot
            if self._is_free(x, y, diameter / 2):
                colour, rgb = chosen
                shape = self.rng.choice(SHAPES)
                self.objects.append(SceneObject(shape, colour, size, place, x, y, diameter, rgb))
                return

    def _spot(self, width: float, height: float, *, margin: float) -> tuple[float, float, str] | None:
        """A centre at which a box of this size fits, clear of the borders between places by `margin` of the frame."""
        if width > 0.98 * self.width or height > 0.98 * self.height:
            return None
        for _ in range(20):
            x = self.rng.uniform(width / 2 + 0.01 * self.width, self.width - width / 2 - 0.01 * self.width)
            y = self.rng.uniform(height / 2 + 0.01 * self.height, self.height - height / 2 - 0.01 * self.height)
            place = place_of(x / self.width, y / self.height, margin=max(margin, 0.03))
            if place is not None:
                return x, y, place
        return None

    def _is_free(self, x: float, y: float, radius: float) -> bool:
        gap = 0.02 * self.unit
        if any(math.dist((x, y), (o.x, o.y)) < radius + o.diameter / 2 + gap for o in self.objects):
            return False
        if self.text is None:
            return True
        t = self.text
        nearest = (min(max(x, t.left), t.left + t.width), min(max(y, t.top), t.top + t.height))
        return math.dist((x, y), nearest) >= radius + gap


def place_of(x: float, y: float, *, margin: float) -> str | None:
    """The name of the place at a relative position (0..1), or None within `margin` of a border between places."""
    if any(abs(value - border) < margin for value in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    return PLACES[min(2, int(y * 3))][min(2, int(x * 3))]
