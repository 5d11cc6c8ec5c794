"""Questions that compare two objects, or two kinds of objects: beside, same, larger, more.

Asked only where the answer is unambiguous: objects clearly apart, or clearly different in size.
"""

import random

from llava_core.scenes.phrases import noun, plural, refer
from llava_core.scenes.question import Question
from llava_core.scenes.scene import Scene, SceneObject


def ask_comparison(scene: Scene, rng: random.Random) -> Question | None:
    """A random comparison, or None where the scene allows none."""
    if len(scene.objects) < 2:
        return None
    one, other = rng.sample(scene.objects, 2)
    first, second = refer(one, scene, rng, without="place"), refer(other, scene, rng, without="place")
    if first is None or second is None or first == second:
        return None
    return rng.choice((_beside, _beside, _same, _bigger, _more))(scene, rng, (one, first), (other, second))


# An object with the phrase that refers to it.
Named = tuple[SceneObject, str]


def _yes_no(text: str, said: str, negated: str, *, holds: bool) -> Question:
    sentence = f"Yes, {said}." if holds else f"No, {negated}."
    return Question("compare", text, "yes" if holds else "no", sentence)


def _beside(scene: Scene, rng: random.Random, one: Named, other: Named) -> Question | None:
    (a, first), (b, second) = one, other
    horizontal = rng.random() < 0.5
    gap = (a.x - b.x) / scene.width if horizontal else (a.y - b.y) / scene.height
    if abs(gap) < 0.12:
        return None
    before = rng.random() < 0.5
    words = ("to the left of", "to the right of") if horizontal else ("above", "below")
    word = words[0] if before else words[1]
    said = f"the {first} is {word} the {second}"
    return _yes_no(
        f"Is the {first} {word} the {second}?", said, said.replace(" is ", " is not ", 1), holds=(gap < 0) == before
    )


def _same(scene: Scene, rng: random.Random, one: Named, other: Named) -> Question | None:
    (a, first), (b, second) = one, other
    name = rng.choice(("colour", "shape", "size"))
    if name == "size" and "medium" in (a.size, b.size):
        return None
    word = rng.choice(("colour", "color")) if name == "colour" else name
    holds = getattr(a, name) == getattr(b, name)
    text = f"Do the {first} and the {second} have the same {word}?"
    return _yes_no(text, f"they have the same {word}", f"they do not have the same {word}", holds=holds)


def _bigger(scene: Scene, rng: random.Random, one: Named, other: Named) -> Question | None:
    (a, first), (b, second) = one, other
    bigger = rng.random() < 0.5
    word = rng.choice(("larger", "bigger")) if bigger else "smaller"
    if max(a.diameter, b.diameter) < 1.3 * min(a.diameter, b.diameter):
        return None
    holds = (a.diameter > b.diameter) == bigger
    if rng.random() < 0.5:
        winner = first if holds else second
        text = f"Which is {word}, the {first} or the {second}?"
        return Question("compare", text, f"the {winner}", f"The {winner} is {word}.")
    said = f"the {first} is {word} than the {second}"
    return _yes_no(f"Is the {first} {word} than the {second}?", said, said.replace(" is ", " is not ", 1), holds=holds)


def _more(scene: Scene, rng: random.Random, one: Named, other: Named) -> Question | None:
    key = rng.choice(("shape", "colour"))
    names = [getattr(one[0], key), getattr(other[0], key)]
    if names[0] == names[1]:
        return None
    counts = [sum(getattr(o, key) == name for o in scene.objects) for name in names]
    thing = noun(rng)
    a, b = (plural(name) if key == "shape" else f"{name} {thing}s" for name in names)
    said = f"there are more {a} than {b}"
    negated = said.replace("are", "are not", 1)
    return _yes_no(f"Are there more {a} than {b}?", said, negated, holds=counts[0] > counts[1])
