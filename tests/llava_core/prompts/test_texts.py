"""The long texts contain no stray white space; test_templates.py compares their bytes."""

from llava_core.prompts import texts


def test_no_system_text_has_stray_white_space_at_its_ends() -> None:
    systems = [value for name, value in vars(texts).items() if name.startswith("SYSTEM_")]
    assert len(systems) == 9
    assert all(system == system.strip() for system in systems)


def test_examples_are_stripped_questions_and_answers_ending_in_newlines() -> None:
    for question, answer in (texts.ENERGY_EXAMPLE, texts.GREETING_EXAMPLE):
        assert question == question.strip()
        assert answer.endswith("\n")
