"""Questions about a scene with their only right answers, in many phrasings, as short and as sentence answers.

A question is asked only where its answer is beyond doubt. Knows scenes, not pictures, and nothing about models.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from llava_core.scenes.scene import Scene, SceneObject
from llava_core.scenes.vocabulary import COLOURS, SHAPES

SENTENCE_REQUESTS = ("Answer in a sentence.", "Answer in a full sentence.", "Reply with a full sentence.")
SHORT_REQUESTS = ("Answer the question using a single word or phrase.", "Answer briefly.", "Answer in one word.")


@dataclass(frozen=True)
class Question:
    """`kind` is the question type of the evaluation; `answer` the short answer, `sentence` the same as a sentence."""

    kind: str
    text: str
    answer: str
    sentence: str


Maker = Callable[[Scene, random.Random], Question | None]


def ask_all(scene: Scene, rng: random.Random, num_questions: int) -> list[Question]:
    """Up to this many different questions, kinds by lot, the hard kinds more often; a description comes last."""
    kinds = list(MAKERS)
    weights = [WEIGHTS[kind] for kind in kinds]
    asked: dict[str, Question] = {}
    for kind in rng.choices(kinds, weights, k=2 * num_questions):
        question = MAKERS[kind](scene, rng)
        if question is not None and len(asked) < num_questions:
            asked.setdefault("describe" if kind == "describe" else question.text, question)
    return sorted(asked.values(), key=lambda question: question.kind == "describe")


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
    """What any object may be called."""
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


def _describe(scene: Scene, rng: random.Random) -> Question | None:
    places = [o.place for o in scene.objects]
    if len(set(places)) < len(places) or any(o.size == "medium" for o in scene.objects):
        return None
    text = rng.choice(
        (
            "Describe the picture.",
            "Describe the image.",
            "Describe this image.",
            "Describe the scene.",
            "What is in the picture?",
            "What is in this image?",
            "What do you see?",
            "What does the picture show?",
            "What can you see in the image?",
            "List everything in the picture.",
            "Describe the picture in detail.",
        )
    )
    answer = describe_scene(scene)
    return Question("describe", text, answer, answer)


def _exists(scene: Scene, rng: random.Random) -> Question | None:
    colour, shape = _probe(scene, rng)
    form = rng.random()
    if form < 0.15:
        phrase, present = f"any {rng.choice(('text', 'writing', 'printed text'))}", scene.text is not None
        said = "text"
    elif form < 0.35:
        phrase, present, said = f"a {shape}", any(o.shape == shape for o in scene.objects), f"a {shape}"
    elif form < 0.5:
        present = any(o.colour == colour for o in scene.objects)
        phrase = said = f"{_article(colour)} {colour} {noun(rng)}"
    else:
        present = any((o.colour, o.shape) == (colour, shape) for o in scene.objects)
        phrase = said = f"{_article(colour)} {colour} {shape}"
    where = rng.choice(("", "", " in the picture", " in the image", " in this image"))
    lead = rng.choice(("Is there", "Is there", "Can you see", "Do you see", "Does the picture show"))
    where = "" if lead.startswith("Does") else where
    sentence = f"Yes, there is {said}." if present else f"No, there is no {said.removeprefix('a ').removeprefix('an ')}."
    return Question("exists", f"{lead} {phrase}{where}?", "yes" if present else "no", sentence)


def _probe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A colour and a shape to ask for: of one object, mixed from two (a hard negative), or by lot."""
    kind = rng.random()
    one, other = rng.choice(scene.objects), rng.choice(scene.objects)
    if kind < 0.42:
        return one.colour, one.shape
    if kind < 0.62:
        return one.colour, other.shape
    if kind < 0.75:
        return one.colour, rng.choice(SHAPES)
    if kind < 0.88:
        return rng.choice(list(COLOURS)), one.shape
    return rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _count(scene: Scene, rng: random.Random) -> Question | None:
    one = rng.choice(scene.objects)
    form = rng.random()
    if form < 0.4:
        matches, phrase, singular = list(scene.objects), f"{noun(rng)}s", "object"
    elif form < 0.65:
        shape = one.shape if rng.random() < 0.75 else rng.choice(SHAPES)
        matches, phrase, singular = [o for o in scene.objects if o.shape == shape], _plural(shape), shape
    elif form < 0.9:
        colour = one.colour if rng.random() < 0.75 else rng.choice(list(COLOURS))
        matches = [o for o in scene.objects if o.colour == colour]
        phrase, singular = f"{colour} {noun(rng)}s", f"{colour} object"
    else:
        matches = [o for o in scene.objects if (o.colour, o.shape) == (one.colour, one.shape)]
        phrase, singular = f"{one.colour} {_plural(one.shape)}", f"{one.colour} {one.shape}"
    number = len(matches)
    text = rng.choice(
        (
            f"How many {phrase} are there?",
            f"How many {phrase} are in the picture?",
            f"How many {phrase} can you see?",
            f"How many {phrase} are there in the image?",
            f"Count the {phrase}.",
            f"What is the number of {phrase}?",
        )
    )
    counted = f"There is 1 {singular}." if number == 1 else f"There are {number} {_plural(singular)}."
    return Question("count", text, str(number), counted)


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("ss") else f"{word}s"


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    one = rng.choice(scene.objects)
    phrase = refer(one, scene, rng, without="colour")
    if phrase is None:
        return None
    word = rng.choice(("colour", "color"))
    text = rng.choice(
        (
            f"What {word} is the {phrase}?",
            f"What {word} is the {phrase}?",
            f"Which {word} is the {phrase}?",
            f"What is the {word} of the {phrase}?",
            f"Which {word} does the {phrase} have?",
            f"Tell me the {word} of the {phrase}.",
        )
    )
    return Question("colour", text, one.colour, f"The {phrase} is {one.colour}.")


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    one = rng.choice(scene.objects)
    phrase = refer(one, scene, rng, without="shape")
    if phrase is None:
        return None
    text = rng.choice(
        (
            f"What shape is the {phrase}?",
            f"Which shape is the {phrase}?",
            f"What is the shape of the {phrase}?",
            f"What is the {phrase}?",
            f"Which shape does the {phrase} have?",
        )
    )
    return Question("shape", text, one.shape, f"The {phrase} is a {one.shape}.")


def _size(scene: Scene, rng: random.Random) -> Question | None:
    one = rng.choice(scene.objects)
    phrase = refer(one, scene, rng, without="size")
    if phrase is None or one.size == "medium":
        return None
    text = rng.choice(
        (
            f"Is the {phrase} small or large?",
            f"Is the {phrase} large or small?",
            f"What size is the {phrase}?",
            f"Which size is the {phrase}?",
            f"How big is the {phrase}?",
            f"How large is the {phrase}?",
            f"Is the {phrase} big or small?",
        )
    )
    return Question("size", text, one.size, f"The {phrase} is {one.size}.")


def _where(scene: Scene, rng: random.Random) -> Question | None:
    if scene.text is not None and rng.random() < 0.12:
        phrase, place = rng.choice(("text", scene.text.kind, "writing")), scene.text.place
    else:
        one = rng.choice(scene.objects)
        found = refer(one, scene, rng, without="place")
        if found is None:
            return None
        phrase, place = found, one.place
    text = rng.choice(
        (
            f"Where is the {phrase}?",
            f"Where is the {phrase}?",
            f"Where is the {phrase} in the picture?",
            f"Where in the image is the {phrase}?",
            f"In which part of the picture is the {phrase}?",
            f"What is the position of the {phrase}?",
            f"Where can you see the {phrase}?",
        )
    )
    return Question("where", text, place, f"The {phrase} is {at(place)}.")


def _compare(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.objects) < 2:
        return None
    one, other = rng.sample(scene.objects, 2)
    first, second = refer(one, scene, rng, without="place"), refer(other, scene, rng, without="place")
    if first is None or second is None or first == second:
        return None
    return rng.choice((_beside, _beside, _same, _bigger, _more))(scene, rng, (one, first), (other, second))


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
    text = f"{rng.choice(('Do', 'Do'))} the {first} and the {second} have the same {word}?"
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
    return _yes_no(
        f"Is the {first} {word} than the {second}?", said, said.replace(" is ", " is not ", 1), holds=holds
    )


def _more(scene: Scene, rng: random.Random, one: Named, other: Named) -> Question | None:
    key = rng.choice(("shape", "colour"))
    names = [getattr(one[0], key), getattr(other[0], key)]
    if names[0] == names[1]:
        return None
    counts = [sum(getattr(o, key) == name for o in scene.objects) for name in names]
    thing = noun(rng)
    a, b = (_plural(name) if key == "shape" else f"{name} {thing}s" for name in names)
    said = f"there are more {a} than {b}"
    return _yes_no(f"Are there more {a} than {b}?", said, said.replace("are", "are not", 1), holds=counts[0] > counts[1])


def _read(scene: Scene, rng: random.Random) -> Question | None:
    if scene.text is None:
        return None
    kind = scene.text.kind
    text = rng.choice(
        (
            "What does the text say?",
            "What is written in the picture?",
            "Read the text.",
            "What text is in the image?",
            f"Which {kind} is printed?",
            f"What {kind} is written?",
            f"What {kind} do you see?",
            f"Read the {kind}.",
            f"What is the {kind} in the picture?",
            f"Which {kind} is in the image?",
        )
    )
    return Question("read", text, scene.text.text, f"The {kind} is {scene.text.text}.")


MAKERS: dict[str, Maker] = {
    "describe": _describe,
    "exists": _exists,
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "where": _where,
    "compare": _compare,
    "read": _read,
}
WEIGHTS = {
    "describe": 1.5,
    "exists": 1.6,
    "count": 1.2,
    "colour": 1.0,
    "shape": 1.0,
    "size": 0.8,
    "where": 1.2,
    "compare": 2.0,
    "read": 1.2,
}
