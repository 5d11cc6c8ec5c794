"""Unseen questions for the evaluation of the default model: scenes of another seed, one question each, as PNG or JPEG.

Knows scenes and samples; nothing about who answers.
"""

import io
import random
from typing import Literal

from llava_core.evaluation.task import Sample
from llava_core.scenes.draw import draw_scene
from llava_core.scenes.questions import MAKERS
from llava_core.scenes.scene import Scene, sample_scene

ImageFormat = Literal["png", "jpeg"]
EVALUATION_SEED = 20_000


def make_samples(num_questions: int, *, image_format: ImageFormat = "png", seed: int = EVALUATION_SEED) -> list[Sample]:
    """Equal numbers of questions of every kind, about pictures of 64 to 1,500 pixels, one question per picture.

    Printed texts are numbers and words, as in the model card; random letters are used only in training.
    """
    kinds = list(MAKERS)
    return [_make(seed, index, kinds[index % len(kinds)], image_format) for index in range(num_questions)]


def _make(seed: int, index: int, kind: str, image_format: ImageFormat) -> Sample:
    """The first scene of this index's series about which this kind of question can be asked."""
    for attempt in range(1000):
        rng = random.Random(f"evaluation:{seed}:{index}:{attempt}")
        scene = sample_scene(rng, random_letters=0.0)
        question = MAKERS[kind](scene, rng)
        if question is not None:
            return Sample(f"{index}", kind, question.text, question.answer, encode_picture(scene, image_format))
    raise AssertionError(f"no scene of 1,000 allows a {kind} question")


def encode_picture(scene: Scene, image_format: ImageFormat) -> bytes:
    """The drawn scene as a PNG or as a JPEG of quality 90."""
    buffer = io.BytesIO()
    draw_scene(scene).save(buffer, "PNG" if image_format == "png" else "JPEG", quality=90)
    return buffer.getvalue()
