"""Noun phrases that fit exactly one object, with their prepositions, articles and plurals."""

import random

import pytest

from llava_core.scenes.phrases import article, at, plural, refer
from llava_core.scenes.scene import Scene, SceneObject, sample_scene


def fits(phrase: str, thing: SceneObject) -> bool:
    """Tells, slowly, whether the phrase names no attribute that the object lacks."""
    head, _, place = phrase.partition(" at the ")
    if not place:
        head, _, place = phrase.partition(" on the ")
    if phrase.endswith(" in the center"):
        head, place = phrase.removesuffix(" in the center"), "center"
    words = [word for word in head.split() if word not in ("object", "shape", "thing", "figure")]
    return all(word in (thing.size, thing.colour, thing.shape) for word in words) and place in ("", thing.place)


def scene_of(seed: int) -> Scene:
    return sample_scene(random.Random(f"phrases:{seed}"))


@pytest.mark.parametrize("without", ["", "size", "colour", "shape", "place"])
def test_a_phrase_fits_its_object_and_no_other(without: str) -> None:
    found = 0
    for seed in range(150):
        scene = scene_of(seed)
        for thing in scene.objects:
            phrase = refer(thing, scene, random.Random(seed), without=without)
            if phrase is not None:
                found += 1
                assert [other for other in scene.objects if fits(phrase, other)] == [thing], phrase
                assert without in ("", "place") or getattr(thing, without) not in phrase.split(" at the ")[0].split()
    assert found > 200


@pytest.mark.parametrize(
    ("place", "expected"),
    [("center", "in the center"), ("left", "on the left"), ("top right", "at the top right"), ("top", "at the top")],
)
def test_places_have_their_preposition(place: str, expected: str) -> None:
    assert at(place) == expected


def test_articles_and_plurals() -> None:
    assert (article("orange"), article("red")) == ("an", "a")
    assert (plural("cross"), plural("star"), plural("red cross")) == ("crosses", "stars", "red crosses")
