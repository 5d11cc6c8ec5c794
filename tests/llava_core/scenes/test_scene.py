"""Random scenes: reproducible, nothing overlaps, everything lies inside the frame and clearly in its named place."""

import itertools
import math
import random

import pytest

from llava_core.scenes.scene import Scene, colour_distance, place_of, reading_order, sample_scene
from llava_core.scenes.vocabulary import COLOURS, PLACES, PRINTED_WORDS, SHAPES, SIZES
from tests.llava_core.scenes import reading

SCENES = [sample_scene(random.Random(seed)) for seed in range(400)]


def test_the_same_seed_draws_the_same_scene() -> None:
    assert [sample_scene(random.Random(seed)) for seed in range(20)] == SCENES[:20]
    assert len(set(map(repr, SCENES))) == len(SCENES)


def test_objects_do_not_touch_one_another() -> None:
    for scene in SCENES:
        for one, other in itertools.combinations(scene.objects, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) > (one.diameter + other.diameter) / 2


def test_objects_do_not_touch_the_text() -> None:
    for scene in SCENES:
        if scene.text is None:
            continue
        box = scene.text
        for thing in scene.objects:
            dx = max(box.left - thing.x, 0, thing.x - box.left - box.width)
            dy = max(box.top - thing.y, 0, thing.y - box.top - box.height)
            assert math.hypot(dx, dy) > thing.diameter / 2


def test_everything_lies_inside_the_frame() -> None:
    for scene in SCENES:
        for thing in scene.objects:
            radius = thing.diameter / 2
            assert radius <= thing.x <= scene.width - radius
            assert radius <= thing.y <= scene.height - radius
        if scene.text is not None:
            assert 0 <= scene.text.left <= scene.width - scene.text.width
            assert 0 <= scene.text.top <= scene.height - scene.text.height


def test_place_names_match_the_centres() -> None:
    for scene in SCENES:
        for thing in scene.objects:
            assert thing.place == reading.place_of(thing.x / scene.width, thing.y / scene.height)
        if scene.text is not None:
            centre = (scene.text.left + scene.text.width / 2, scene.text.top + scene.text.height / 2)
            assert scene.text.place == reading.place_of(centre[0] / scene.width, centre[1] / scene.height)


def test_no_centre_is_near_a_border_between_places() -> None:
    for scene in SCENES:
        for thing in scene.objects:
            for share in (thing.x / scene.width, thing.y / scene.height):
                assert min(abs(share - 1 / 3), abs(share - 2 / 3)) >= 0.03


def test_sizes_match_their_names() -> None:
    for scene in SCENES:
        unit = math.sqrt(scene.width * scene.height)
        for thing in scene.objects:
            low, high = SIZES[thing.size]
            assert low - 1e-9 <= thing.diameter / unit <= high + 1e-9


def test_colours_are_near_their_names_and_stand_out_from_the_background() -> None:
    for scene in SCENES:
        for thing in scene.objects:
            nearest = min(COLOURS, key=lambda name: min(math.dist(anchor, thing.rgb) for anchor in COLOURS[name]))
            assert nearest == thing.colour
            assert colour_distance(thing.rgb, scene.background) > 90


def test_objects_are_in_reading_order() -> None:
    names = [name for row in PLACES for name in row]
    for scene in SCENES:
        order = [(names.index(thing.place), thing.x) for thing in scene.objects]
        assert order == sorted(order) == [reading_order(thing) for thing in scene.objects]


def test_scenes_are_varied() -> None:
    assert {len(scene.objects) for scene in SCENES} == {1, 2, 3, 4, 5, 6}
    assert {thing.shape for scene in SCENES for thing in scene.objects} == set(SHAPES)
    assert {thing.colour for scene in SCENES for thing in scene.objects} == set(COLOURS)
    assert {scene.background_style for scene in SCENES} == {"plain", "noise", "gradient", "blotches"}
    texts = [scene.text.kind for scene in SCENES if scene.text is not None]
    assert 0.25 < len(texts) / len(SCENES) < 0.5
    assert set(texts) == {"word", "number"}


@pytest.mark.parametrize("sides", [(64, 64), (64, 1500), (500, 1500)])
def test_the_longer_side_is_as_requested_and_the_aspect_is_bounded(sides: tuple[int, int]) -> None:
    for seed in range(60):
        scene: Scene = sample_scene(random.Random(seed), longest_side=sides)
        longer, shorter = max(scene.width, scene.height), min(scene.width, scene.height)
        assert sides[0] <= longer <= sides[1]
        assert longer / shorter <= 3.1


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [(0.1, 0.1, "top left"), (0.5, 0.1, "top"), (0.9, 0.5, "right"), (0.5, 0.5, "center"), (1.0, 1.0, "bottom right")],
)
def test_places_have_names(x: float, y: float, place: str) -> None:
    assert place_of(x, y, margin=0.03) == place


@pytest.mark.parametrize(("x", "y"), [(0.34, 0.1), (0.1, 0.65), (1 / 3, 1 / 3)])
def test_positions_near_a_border_have_no_name(x: float, y: float) -> None:
    assert place_of(x, y, margin=0.03) is None


def test_without_random_letters_texts_are_numbers_and_words() -> None:
    def texts(share: float) -> list[str]:
        scenes = (sample_scene(random.Random(seed), random_letters=share) for seed in range(150))
        return [scene.text.text for scene in scenes if scene.text is not None]

    plain = texts(0.0)
    assert any(text.isdigit() for text in plain)
    assert all(text.isdigit() or text in PRINTED_WORDS for text in plain)
    assert not any(text.isdigit() or text in PRINTED_WORDS for text in texts(1.0) if len(text) > 3)
