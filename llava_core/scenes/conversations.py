"""Scenes as training conversations: many questions about one picture in one sequence, for each stage of the recipe.

Index `i` always yields the same example, so interrupted training resumes exactly. Knows scenes, prompts and feature
arrays; nothing about models.
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from llava_core.prompts.conversation import IMAGE_PLACEHOLDER, Turn
from llava_core.prompts.templates import get_template
from llava_core.prompts.tokenize import TokenizedPrompt, Tokenizer
from llava_core.scenes.cache import SceneCache
from llava_core.scenes.phrases import describe_scene
from llava_core.scenes.question import SENTENCE_REQUESTS, SHORT_REQUESTS, Question
from llava_core.scenes.questions import ask_all
from llava_core.scenes.scene import Scene
from llava_core.scenes.tokenizer import TEMPLATE_NAME
from llava_core.training.collate import Example
from llava_core.training.dataset import build_example
from llava_core.training.packing import Packed, pack_alone, pack_shared_prefix

Purpose = Literal["language", "align", "instruct", "joint", "sharpen"]
NO_PICTURE = "There is no picture."


@dataclass(frozen=True)
class ConversationSpec:
    """`passes` is how often each scene is used, each time with other questions. `together` is the share of examples
    whose questions are turns of one conversation; in the others each is on its own (training/packing.py)."""

    purpose: Purpose
    passes: int = 1
    questions: int = 13
    together: float = 0.2
    max_length: int = 320


class SceneConversations(Dataset[Example]):
    """Examples of one purpose: `language` has the caption as text in place of the picture, `align` asks only for the
    caption, the others ask all questions. `images` has one row per scene: the tower's features, or tiles."""

    def __init__(
        self,
        cache: SceneCache,
        images: npt.NDArray[np.float16] | npt.NDArray[np.uint8],
        tokenizer: Tokenizer,
        spec: ConversationSpec,
        *,
        image_tokens: int,
    ) -> None:
        self.cache = cache
        self.images = images
        self.image_tokens = image_tokens
        self.tokenizer = tokenizer
        self.spec = spec
        self.template = get_template("plain" if spec.purpose == "align" else TEMPLATE_NAME)

    def __len__(self) -> int:
        return len(self.images) * self.spec.passes

    def __getitem__(self, index: int) -> Example:
        scene_index = index % len(self.images)
        rng = random.Random(f"{self.spec.purpose}:{index}")
        conversations = self._conversations(self.cache.scene(scene_index), rng)
        has_picture = IMAGE_PLACEHOLDER in (conversations[0][0].text or "")
        tokens = self._tokens(conversations, [self.image_tokens] if has_picture else [])
        chosen = self.images[scene_index : scene_index + 1] if has_picture else self.images[:0]
        return {"tokens": tokens, "images": torch.from_numpy(np.array(chosen))}

    def _tokens(self, conversations: list[list[Turn]], image_tokens: list[int]) -> Packed:
        limit = self.spec.max_length
        if len(conversations) > 1:
            # The description, the last question, comes first here, so that it is not the one that no longer fits.
            prompts = [self._build(turns, image_tokens) for turns in reversed(conversations)]
            return pack_shared_prefix(prompts, max_length=limit)
        turns = conversations[0]
        while len((prompt := self._build(turns, image_tokens)).ids) > limit:
            turns = turns[:-2]
        return pack_alone(prompt)

    def _build(self, turns: list[Turn], image_tokens: list[int]) -> TokenizedPrompt:
        return build_example(turns, self.template, self.tokenizer, image_tokens, max_length=4096)

    def _conversations(self, scene: Scene, rng: random.Random) -> list[list[Turn]]:
        if self.spec.purpose == "align":
            return [[Turn("user", IMAGE_PLACEHOLDER), Turn("assistant", describe_scene(scene))]]
        questions = ask_all(scene, rng, self.spec.questions)
        shows_picture = self.spec.purpose != "language"
        if shows_picture and rng.random() < 0.01:
            return [[Turn("user", vary(questions[0].text, rng)), Turn("assistant", NO_PICTURE)]]
        opening = f"{IMAGE_PLACEHOLDER}\n" if shows_picture else f"{describe_scene(scene)}\n"
        if rng.random() < self.spec.together:
            # Few enough that the description, which comes last, still fits.
            turns = [turn for question in questions[-8:] for turn in exchange(question, rng)]
            return [[Turn("user", f"{opening}{turns[0].text}"), *turns[1:]]]
        pairs = [exchange(question, rng) for question in questions]
        return [[Turn("user", f"{opening}{asked.text}"), answer] for asked, answer in pairs]


def exchange(question: Question, rng: random.Random) -> tuple[Turn, Turn]:
    """The question and its answer; one in eight asks for a sentence, as many explicitly for a short answer."""
    form = rng.random()
    asked, answer = vary(question.text, rng), question.answer
    if form < 0.12:
        asked, answer = f"{asked} {rng.choice(SENTENCE_REQUESTS)}", question.sentence
    elif form < 0.24 and question.kind != "describe":
        asked = f"{asked}{rng.choice((chr(10), ' '))}{rng.choice(SHORT_REQUESTS)}"
    return Turn("user", asked), Turn("assistant", answer)


def vary(text: str, rng: random.Random) -> str:
    """The question as people type it: sometimes without its capital or its final mark."""
    if rng.random() < 0.1:
        text = text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 0.08 else text
