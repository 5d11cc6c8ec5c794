"""Comparisons are asked only when unambiguous; test_questions.py checks their answers."""

import random
import re

from llava_core.scenes.comparisons import ask_comparison
from llava_core.scenes.question import Question
from llava_core.scenes.scene import sample_scene


def comparisons() -> list[Question]:
    found = []
    for seed in range(400):
        rng = random.Random(f"comparisons:{seed}")
        question = ask_comparison(sample_scene(rng), rng)
        if question is not None:
            found.append(question)
    return found


def test_every_form_is_asked_with_both_answers() -> None:
    forms = {"beside": "left of|right of|above|below", "same": "have the same", "bigger": "than the", "more": "more"}
    questions = comparisons()
    for form, pattern in forms.items():
        answers = {question.answer for question in questions if re.search(pattern, question.text)}
        assert {"yes", "no"} <= answers, form


def test_a_choice_is_answered_with_one_of_the_two_objects() -> None:
    chosen = [question for question in comparisons() if question.text.startswith("Which")]
    assert len(chosen) > 5
    for question in chosen:
        assert question.answer in question.text


def test_a_scene_with_one_object_has_no_comparison() -> None:
    scenes = [sample_scene(random.Random(seed)) for seed in range(60)]
    alone = [scene for scene in scenes if len(scene.objects) == 1]
    assert alone
    assert all(ask_comparison(scene, random.Random(0)) is None for scene in alone)
