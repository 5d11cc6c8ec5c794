"""Every answer is derived again, slowly, from the question's text and the scene; no question is ambiguous."""

import random
import re
from collections import Counter

import pytest

from llava_core.scenes.phrases import describe_scene
from llava_core.scenes.question import Question
from llava_core.scenes.questions import MAKERS, WEIGHTS, ask_all
from llava_core.scenes.scene import Scene, sample_scene
from tests.llava_core.scenes.reading import PLACES, parse_description, read_answer

SCENES = [sample_scene(random.Random(f"questions:{seed}")) for seed in range(250)]


def asked(kind: str) -> list[tuple[Scene, Question]]:
    """Asks several questions of one kind about every scene that allows one."""
    pairs = []
    for index, scene in enumerate(SCENES):
        rng = random.Random(index)
        pairs += [(scene, question) for _ in range(6) if (question := MAKERS[kind](scene, rng)) is not None]
    assert len(pairs) > 200
    return pairs


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "describe"])
def test_answers_equal_a_slow_reading_of_the_scene(kind: str) -> None:
    for scene, question in asked(kind):
        assert question.kind == kind
        assert question.answer == read_answer(scene, kind, question.text), question


def test_descriptions_list_everything_in_reading_order() -> None:
    for scene, question in asked("describe"):
        objects, texts = parse_description(question.answer)
        assert objects == [(o.size, o.colour, o.shape, o.place) for o in scene.objects]
        assert texts == ([(scene.text.kind, scene.text.text, scene.text.place)] if scene.text is not None else [])
        assert question.answer == question.sentence == describe_scene(scene)


def test_only_unambiguous_scenes_are_described() -> None:
    for scene, _ in asked("describe"):
        places = [thing.place for thing in scene.objects]
        assert len(set(places)) == len(places)
        assert "medium" not in {thing.size for thing in scene.objects}


@pytest.mark.parametrize("kind", ["colour", "shape", "size", "where", "read", "count"])
def test_sentences_contain_the_short_answer(kind: str) -> None:
    for _, question in asked(kind):
        assert re.search(rf"\b{re.escape(question.answer)}\b", question.sentence), question
        assert question.sentence.endswith(".")
        assert question.sentence[0].isupper()


@pytest.mark.parametrize("kind", ["exists", "compare"])
def test_sentences_agree_with_yes_and_no(kind: str) -> None:
    for _, question in asked(kind):
        if question.answer in ("yes", "no"):
            assert question.sentence.lower().startswith(f"{question.answer}, ")
            denies = " not " in question.sentence or " no " in question.sentence
            assert denies == (question.answer == "no"), question
        else:
            assert question.sentence.lower().startswith(question.answer)


@pytest.mark.parametrize(("kind", "least"), [("exists", 0.35), ("compare", 0.25)])
def test_yes_and_no_are_both_common(kind: str, least: float) -> None:
    counts = Counter(question.answer for _, question in asked(kind))
    for answer in ("yes", "no"):
        assert counts[answer] > least * counts.total()


def test_every_kind_of_answer_occurs() -> None:
    assert {question.answer for _, question in asked("where")} == set(PLACES)
    assert {question.answer for _, question in asked("size")} == {"small", "large"}
    assert {question.answer for _, question in asked("count")} >= {"0", "1", "2", "3", "4", "5", "6"}


def test_medium_is_never_mentioned() -> None:
    for kind in MAKERS:
        assert not any("medium" in f"{question.text} {question.sentence}" for _, question in asked(kind))


def test_questions_have_several_phrasings() -> None:
    for kind in MAKERS:
        openings = {" ".join(question.text.split()[:2]) for _, question in asked(kind)}
        assert len(openings) >= 3, (kind, openings)


def test_ask_all_gives_distinct_questions_with_the_description_last() -> None:
    for index, scene in enumerate(SCENES[:60]):
        questions = ask_all(scene, random.Random(index), 10)
        assert 0 < len(questions) <= 10
        assert len({question.text for question in questions}) == len(questions)
        kinds = [question.kind for question in questions]
        assert "describe" not in kinds[:-1]


def test_the_same_seed_asks_the_same_questions() -> None:
    assert ask_all(SCENES[0], random.Random(7), 8) == ask_all(SCENES[0], random.Random(7), 8)


def test_every_kind_has_a_weight() -> None:
    assert set(WEIGHTS) == set(MAKERS)
