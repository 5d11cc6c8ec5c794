"""Puts the things in a scene into words: descriptions, places, noun phrases that fit exactly one object.

Knows scenes; nothing about which questions are asked.
"""

import random

from llava_core.scenes.scene import Scene, SceneObject


def describe_scene(scene: Scene) -> str:
    """All objects in reading order, then the printed text: the long answer."""
    parts = [f"a {o.size} {o.colour} {o.shape} {at(o.place)}" for o in scene.objects]
    if scene.text is not None:
        parts.append(f"the {scene.text.kind} {scene.text.text} {at(scene.text.place)}")
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return listed[0].upper() + listed[1:] + "."


def at(place: str) -> str:
    """The place with its preposition: `in the center`, `on the left`, `at the top right`."""
    if place == "center":
        return "in the center"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def refer(thing: SceneObject, scene: Scene, rng: random.Random, *, without: str = "") -> str | None:
    """A noun phrase that fits only this object and does not mention the attribute `without`; None if there is none.

    Looks like `star`, `red object`, `small red star` or `object at the top left`.
    """
    attributes = [name for name in ("size", "colour", "shape") if name != without]
    combinations = [("shape",), ("colour",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape")]
    usable = [c for c in combinations if set(c) <= set(attributes) and not ("size" in c and thing.size == "medium")]
    unique = [c for c in usable if sum(_agrees(thing, other, c) for other in scene.objects) == 1]
    phrases = [_phrase(thing, c, rng) for c in unique]
    if without != "place" and sum(o.place == thing.place for o in scene.objects) == 1 and not _text_at(scene, thing):
        phrases.append(f"{noun(rng)} {at(thing.place)}")
    return rng.choice(phrases) if phrases else None


def noun(rng: random.Random) -> str:
    """A noun that fits any object."""
    return rng.choice(("object", "shape", "thing", "figure"))


def _agrees(one: SceneObject, other: SceneObject, names: tuple[str, ...]) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _phrase(thing: SceneObject, names: tuple[str, ...], rng: random.Random) -> str:
    words = [getattr(thing, name) for name in names]
    if "shape" not in names:
        words.append(noun(rng))
    return " ".join(words)


def _text_at(scene: Scene, thing: SceneObject) -> bool:
    return scene.text is not None and scene.text.place == thing.place


def article(word: str) -> str:
    """`a` or `an`."""
    return "an" if word[0] in "aeiou" else "a"


def plural(word: str) -> str:
    """The noun, or the phrase that ends in it, in the plural."""
    return f"{word}es" if word.endswith("ss") else f"{word}s"
