"""Derives answers from a scene and a question's text in the slowest, most obvious way: a second opinion for tests."""

import re

from llava_core.scenes.scene import Scene, SceneObject

SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross"]
COLOURS = ["red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "black", "white"]
PLACES = ["top left", "top right", "bottom left", "bottom right", "top", "bottom", "left", "right", "center"]
NOUNS = ["object", "shape", "thing", "figure"]
TEXT_NOUNS = ["text", "word", "number", "writing"]

_PHRASE = (
    rf"(?:(small|large) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES + NOUNS)})"
    rf"(?: (?:at|on|in) the ({'|'.join(PLACES)}))?"
)
NAMED = re.compile(rf"\b[Tt]he {_PHRASE}\b")
_PLURALS = [f"{word}es" if word == "cross" else f"{word}s" for word in SHAPES + NOUNS]
PLURAL = re.compile(rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(_PLURALS)})\b")


def place_of(x: float, y: float) -> str:
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    return f"{row} {column}".strip() or "center"


def matching(scene: Scene, size: str | None, colour: str | None, noun: str, place: str | None) -> list[SceneObject]:
    found = []
    for thing in scene.objects:
        fits = (size in (None, thing.size), colour in (None, thing.colour), place in (None, thing.place))
        if all(fits) and (noun in NOUNS or noun == thing.shape):
            found.append(thing)
    return found


def named_objects(scene: Scene, text: str) -> list[SceneObject]:
    """Returns the objects that a question names; each name must fit exactly one object."""
    # `the shape of the red star` names a star; its first three words are not a name.
    text = re.sub(r"\bthe shape of ", "", text)
    found = []
    for match in NAMED.finditer(text):
        things = matching(scene, *match.groups())
        assert len(things) == 1, f"{match.group()!r} fits {len(things)} objects in {text!r}"
        if match.group(4) is not None and scene.text is not None:
            assert scene.text.place != match.group(4), f"{match.group()!r} could be the text in {text!r}"
        found.append(things[0])
    return found


def plural_objects(scene: Scene, colour: str | None, noun: str) -> list[SceneObject]:
    singular = "cross" if noun == "crosses" else noun[:-1]
    return matching(scene, None, colour, singular, None)


def read_answer(scene: Scene, kind: str, text: str) -> str:
    """Returns the answer to a question of this kind."""
    return _READERS[kind](scene, text)


def _exists(scene: Scene, text: str) -> str:
    if re.search(r"any (text|writing|printed text)", text):
        return "yes" if scene.text is not None else "no"
    match = re.search(rf"\ban? (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES + NOUNS)})\b", text)
    assert match, text
    return "yes" if matching(scene, None, match.group(1), match.group(2), None) else "no"


def _count(scene: Scene, text: str) -> str:
    match = PLURAL.search(text)
    assert match, text
    return str(len(plural_objects(scene, *match.groups())))


def _only(scene: Scene, text: str) -> SceneObject:
    found = named_objects(scene, text)
    assert len(found) == 1, text
    return found[0]


def _where(scene: Scene, text: str) -> str:
    if re.search(rf"\bthe ({'|'.join(TEXT_NOUNS)})\b", text):
        assert scene.text is not None
        return scene.text.place
    return _only(scene, text).place


def _read(scene: Scene, text: str) -> str:
    assert scene.text is not None
    return scene.text.text


def _describe(scene: Scene, text: str) -> str:
    """Returns nothing, because `parse_description` checks descriptions."""
    return ""


def _compare(scene: Scene, text: str) -> str:
    if text.startswith("Are there more"):
        first, second = (plural_objects(scene, *match.groups()) for match in PLURAL.finditer(text))
        return "yes" if len(first) > len(second) else "no"
    if text.startswith("Which is"):
        return _which(scene, text)
    a, b = named_objects(scene, text)
    assert a != b, text
    if match := re.search(r"have the same (colou?r|shape|size)", text):
        name = {"color": "colour"}.get(match.group(1), match.group(1))
        assert name != "size" or "medium" not in (a.size, b.size)
        return "yes" if getattr(a, name) == getattr(b, name) else "no"
    return "yes" if _relation(scene, text, a, b) else "no"


def _relation(scene: Scene, text: str, a: SceneObject, b: SceneObject) -> bool:
    if match := re.search(r"(larger|bigger|smaller) than", text):
        assert max(a.diameter, b.diameter) >= 1.29 * min(a.diameter, b.diameter), "sizes too close to compare"
        return a.diameter < b.diameter if match.group(1) == "smaller" else a.diameter > b.diameter
    gap_x, gap_y = (b.x - a.x) / scene.width, (b.y - a.y) / scene.height
    for words, gap in (("to the left of", gap_x), ("to the right of", -gap_x), ("above", gap_y), ("below", -gap_y)):
        if words in text:
            assert abs(gap) > 0.1, "places too close to compare"
            return gap > 0
    raise AssertionError(f"no comparison in {text!r}")


def _which(scene: Scene, text: str) -> str:
    match = re.fullmatch(r"Which is (larger|bigger|smaller), the (.+) or the (.+)\?", text)
    assert match, text
    (a,), (b,) = (named_objects(scene, f"the {match.group(index)}") for index in (2, 3))
    first_wins = a.diameter < b.diameter if match.group(1) == "smaller" else a.diameter > b.diameter
    return f"the {match.group(2 if first_wins else 3)}"


def parse_description(text: str) -> tuple[list[tuple[str, str, str, str]], list[tuple[str, str, str]]]:
    """Returns the objects (size, colour, shape, place) and texts (kind, text, place) of a description, in order."""
    text = text[0].lower() + text[1:]
    place = rf"(?:at|on|in) the ({'|'.join(PLACES)})"
    objects = re.findall(rf"a (\w+) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) {place}", text)
    return objects, re.findall(rf"the (word|number) (\w+) {place}", text)


_READERS = {
    "exists": _exists,
    "count": _count,
    "colour": lambda scene, text: _only(scene, text).colour,
    "shape": lambda scene, text: _only(scene, text).shape,
    "size": lambda scene, text: _only(scene, text).size,
    "where": _where,
    "compare": _compare,
    "read": _read,
    "describe": _describe,
}
