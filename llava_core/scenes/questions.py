"""Questions about a scene with their only right answers, in many phrasings, as short and as sentence answers.

A question is asked only where its answer is unambiguous. Knows scenes, not pictures, and nothing about models.
"""

import random
from collections.abc import Callable

from llava_core.scenes.comparisons import ask_comparison
from llava_core.scenes.phrases import article, at, describe_scene, noun, plural, refer
from llava_core.scenes.question import Question
from llava_core.scenes.scene import Scene
from llava_core.scenes.vocabulary import COLOURS, SHAPES

Maker = Callable[[Scene, random.Random], Question | None]


def ask_all(scene: Scene, rng: random.Random, num_questions: int) -> list[Question]:
    """Up to this many different questions of random kinds, hard kinds more often; a description comes last."""
    kinds = list(MAKERS)
    weights = [WEIGHTS[kind] for kind in kinds]
    asked: dict[str, Question] = {}
    for kind in rng.choices(kinds, weights, k=2 * num_questions):
        question = MAKERS[kind](scene, rng)
        if question is not None and len(asked) < num_questions:
            asked.setdefault("describe" if kind == "describe" else question.text, question)
    return sorted(asked.values(), key=lambda question: question.kind == "describe")


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
        phrase = said = f"{article(colour)} {colour} {noun(rng)}"
    else:
        present = any((o.colour, o.shape) == (colour, shape) for o in scene.objects)
        phrase = said = f"{article(colour)} {colour} {shape}"
    where = rng.choice(("", "", " in the picture", " in the image", " in this image"))
    lead = rng.choice(("Is there", "Is there", "Can you see", "Do you see", "Does the picture show"))
    where = "" if lead.startswith("Does") else where
    thing = said.removeprefix("a ").removeprefix("an ")
    sentence = f"Yes, there is {said}." if present else f"No, there is no {thing}."
    return Question("exists", f"{lead} {phrase}{where}?", "yes" if present else "no", sentence)


def _probe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A colour and a shape to ask for: of one object, mixed from two (a hard negative), or random."""
    kind = rng.random()
    one, other = rng.choice(scene.objects), rng.choice(scene.objects)
    if kind < 0.30:
        return one.colour, one.shape
    if kind < 0.52:
        return one.colour, other.shape
    if kind < 0.68:
        return one.colour, rng.choice(SHAPES)
    if kind < 0.84:
        return rng.choice(list(COLOURS)), one.shape
    return rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _count(scene: Scene, rng: random.Random) -> Question | None:
    one = rng.choice(scene.objects)
    form = rng.random()
    if form < 0.4:
        matches, phrase, singular = list(scene.objects), f"{noun(rng)}s", "object"
    elif form < 0.65:
        shape = one.shape if rng.random() < 0.75 else rng.choice(SHAPES)
        matches, phrase, singular = [o for o in scene.objects if o.shape == shape], plural(shape), shape
    elif form < 0.9:
        colour = one.colour if rng.random() < 0.75 else rng.choice(list(COLOURS))
        matches = [o for o in scene.objects if o.colour == colour]
        phrase, singular = f"{colour} {noun(rng)}s", f"{colour} object"
    else:
        matches = [o for o in scene.objects if (o.colour, o.shape) == (one.colour, one.shape)]
        phrase, singular = f"{one.colour} {plural(one.shape)}", f"{one.colour} {one.shape}"
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
    counted = f"There is 1 {singular}." if number == 1 else f"There are {number} {plural(singular)}."
    return Question("count", text, str(number), counted)


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
    "compare": ask_comparison,
    "read": _read,
}
WEIGHTS = {
    "describe": 1.5,
    "exists": 0.8,
    "count": 2.0,
    "colour": 0.6,
    "shape": 0.8,
    "size": 0.5,
    "where": 0.8,
    "compare": 2.0,
    "read": 2.5,
}
