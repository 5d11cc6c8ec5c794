"""Pictures of scenes: reproducible, every object in its place and colour, and nothing drawn anywhere else."""

import random
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageChops

from llava_core.scenes.draw import character_centres, compress_jpeg, draw_scene, fit_font, font_files, shape_points
from llava_core.scenes.scene import Scene, SceneObject, sample_scene
from llava_core.scenes.vocabulary import SHAPES

SCENES = [sample_scene(random.Random(f"draw:{seed}"), longest_side=(150, 400)) for seed in range(40)]
WITH_TEXT = [scene for scene in SCENES if scene.text is not None]


def plain(scene: Scene) -> Scene:
    return replace(scene, background_style="plain")


def changed(one: Image.Image, other: Image.Image) -> tuple[int, int, int, int]:
    """Returns the box (left, top, right, bottom) in which two pictures differ clearly."""
    difference = ImageChops.difference(one, other).convert("L").point(lambda level: 255 if level > 8 else 0)
    box = difference.getbbox()
    assert box is not None
    return box


@pytest.mark.parametrize("scene", SCENES[:10], ids=lambda scene: str(scene.seed))
def test_a_scene_always_gives_the_same_picture(scene: Scene) -> None:
    picture = draw_scene(scene)
    assert (picture.mode, picture.size) == ("RGB", (scene.width, scene.height))
    assert picture.tobytes() == draw_scene(scene).tobytes()


def test_the_middle_of_every_object_has_its_colour() -> None:
    for scene in SCENES:
        picture = draw_scene(scene)
        for thing in scene.objects:
            pixel = picture.getpixel((int(thing.x), int(thing.y)))
            assert isinstance(pixel, tuple)
            assert max(abs(got - wanted) for got, wanted in zip(pixel, thing.rgb, strict=True)) <= 3, thing


def test_an_object_stays_within_its_circle() -> None:
    for scene in map(plain, SCENES):
        # The last object, because removing any other would change the random numbers of those after it.
        thing = scene.objects[-1]
        left, top, right, bottom = changed(draw_scene(scene), draw_scene(replace(scene, objects=scene.objects[:-1])))
        reach = 1.12 * thing.diameter / 2 + 3
        assert thing.x - reach <= left
        assert right <= thing.x + reach
        assert thing.y - reach <= top
        assert bottom <= thing.y + reach
        assert min(right - left, bottom - top) > 0.55 * thing.diameter


def test_text_stays_within_its_box_and_fills_it_in_one_direction() -> None:
    for scene in map(plain, WITH_TEXT):
        assert scene.text is not None
        left, top, right, bottom = changed(draw_scene(scene), draw_scene(replace(scene, text=None)))
        box = scene.text
        assert box.left - 3 <= left
        assert right <= box.left + box.width + 3
        assert box.top - 3 <= top
        assert bottom <= box.top + box.height + 3
        assert (right - left) > 0.75 * box.width or (bottom - top) > 0.75 * box.height


def test_characters_are_centred_from_left_to_right_within_the_box() -> None:
    for scene in WITH_TEXT:
        assert scene.text is not None
        centres = character_centres(scene.text)
        assert len(centres) == len(scene.text.text)
        columns = [x for x, _ in centres]
        assert columns == sorted(columns)
        assert scene.text.left - 2 <= columns[0]
        assert columns[-1] <= scene.text.left + scene.text.width + 2


@pytest.mark.parametrize("style", ["plain", "noise", "gradient", "blotches"])
def test_backgrounds_keep_their_mean_colour(style: str) -> None:
    scene = replace(SCENES[0], background_style=style, background=(150, 140, 160), objects=(), text=None)
    pixels = np.asarray(draw_scene(scene), np.float64)
    assert np.abs(pixels.mean((0, 1)) - scene.background).max() < 16
    assert (pixels.std((0, 1)).max() > 1) == (style != "plain")


def mask(shape: str, seed: int) -> npt.NDArray[np.bool_]:
    thing = SceneObject(shape, "red", "large", "center", 50, 50, 80, (255, 0, 0))
    scene = Scene(100, 100, (255, 255, 255), "plain", (thing,), None, seed)
    return np.asarray(draw_scene(scene).convert("L")) < 200


def test_shapes_are_distinguishable() -> None:
    for seed in range(8):
        masks = {shape: mask(shape, seed) for shape in SHAPES}
        for shape, one in masks.items():
            others = [other for name, other in masks.items() if name != shape]
            overlaps = [(one & other).sum() / (one | other).sum() for other in others]
            assert max(overlaps) < 0.93, shape


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "circle"])
def test_corners_lie_near_their_circle(shape: str) -> None:
    for seed in range(20):
        points = np.array(shape_points(shape, 10, 20, 5, random.Random(seed))) - (10, 20)
        assert np.linalg.norm(points, axis=1).max() < 1.25 * 5


def test_fonts_exist_and_fit_their_box() -> None:
    assert len(font_files()) == 7
    for scene in WITH_TEXT:
        assert scene.text is not None
        left, _, right, _ = fit_font(scene.text, 1).getbbox(scene.text.text)
        assert right - left <= scene.text.width + 2


def test_jpeg_changes_pixels_but_not_the_picture() -> None:
    picture = draw_scene(SCENES[0])
    compressed = compress_jpeg(picture, 75)
    difference = np.abs(np.asarray(picture, np.int16) - np.asarray(compressed, np.int16))
    assert compressed.size == picture.size
    assert 0 < difference.mean() < 12
