"""`llava default-model`: rebuild the default model from scratch, draw its scenes, measure its accuracy.

Parses options and prints; the work is in the recipe, samples and evaluation modules, imported when called.
"""

from __future__ import annotations

import json
import logging
import platform
import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import click

if TYPE_CHECKING:
    from llava_core.evaluation.task import Answer, Answerer


@click.group("default-model")
def default_model() -> None:
    """Rebuild and evaluate the small model that comes with this project, and draw its scenes."""


@default_model.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/work"), help="For pictures, checkpoints.")
@click.option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Multiply the numbers of pictures and steps, for a quick trial.",
)
def build(out: Path, work: Path, scale: float) -> None:
    """Draw the pictures and train every stage into OUT; run it again to resume after an interruption."""
    from llava_core.scenes import recipe

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe.build(recipe.Recipe().scaled(scale), work, out)


@default_model.command()
@click.option("--model", default=None, help="Checkpoint folder or hub id (default: the default model).")
@click.option(
    "--url",
    default=None,
    help="Ask a running service instead, such as http://127.0.0.1:8000; LLAVA_API_KEY is its key.",
)
@click.option("--questions", type=click.IntRange(9), default=2000)
@click.option("--image-format", type=click.Choice(["png", "jpeg"]), default="png")
@click.option("--errors", type=click.File("w", lazy=False), default=None, help="Write wrong answers to this file.")
def evaluate(
    model: str | None, url: str | None, questions: int, image_format: Literal["png", "jpeg"], errors: TextIO | None
) -> None:
    """Measure exact matches over unseen questions, by question type."""
    from llava_core.evaluation.task import score
    from llava_core.scenes.samples import make_samples

    samples = make_samples(questions, image_format=image_format)
    answerer = _answerer(model, url)
    with click.progressbar(answerer.answer(samples), length=len(samples), label="answering") as bar:
        answers = list(bar)
    click.echo(f"{url or model or 'default model'}, {image_format}, {platform.machine()}")
    click.echo(score(answers).table())
    if errors is not None:
        errors.writelines(_error_line(answer) for answer in answers if not answer.is_right)


def _error_line(answer: Answer) -> str:
    sample = answer.sample
    row = {"kind": sample.kind, "question": sample.question, "expected": sample.expected, "answer": answer.text}
    return json.dumps(row) + "\n"


def _answerer(model: str | None, url: str | None) -> Answerer:
    if url is not None:
        from llava_core.evaluation.openai_answerer import OpenAIAnswerer, served_model

        return OpenAIAnswerer(url, served_model(url))
    from llava_core.inference import DEFAULT_MODEL, LocalAnswerer, LocalModel

    return LocalAnswerer(LocalModel(model or DEFAULT_MODEL))


@default_model.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", type=int, default=0)
def draw(out: Path, seed: int) -> None:
    """Draw one scene to the picture OUT and print questions about it with their answers."""
    from llava_core.scenes.draw import draw_scene
    from llava_core.scenes.questions import ask_all
    from llava_core.scenes.scene import sample_scene

    rng = random.Random(seed)
    scene = sample_scene(rng, longest_side=(300, 800))
    try:
        draw_scene(scene).save(out)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{out} cannot be written: {error}") from error
    for question in ask_all(scene, rng, 10):
        click.echo(f"{question.kind:9} {question.text}  {question.answer}")
