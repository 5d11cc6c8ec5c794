"""Scenes as training examples: reproducible by index, within the length, one picture's features per placeholder row."""

import re

import numpy as np
import numpy.typing as npt
import pytest
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.tokenizer import CheckpointTokenizer
from llava_core.prompts.tokenize import IGNORE_LABEL, IMAGE_TOKEN_ID
from llava_core.scenes.cache import SceneCache
from llava_core.scenes.conversations import NO_PICTURE, ConversationSpec, Purpose, SceneConversations
from llava_core.scenes.phrases import describe_scene
from llava_core.training.collate import Example
from tests.llava_core.scenes.conftest import SPEC

IMAGE_TOKENS, HIDDEN = 16, 8


@pytest.fixture
def features() -> npt.NDArray[np.float16]:
    return np.random.default_rng(0).standard_normal((SPEC.num_scenes, IMAGE_TOKENS, HIDDEN)).astype(np.float16)


class Conversations:
    """Builds datasets for a purpose and decodes their examples."""

    def __init__(
        self, cache: SceneCache, features: npt.NDArray[np.float16], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.cache, self.features, self.tokenizer = cache, features, tokenizer

    def of(self, purpose: Purpose, **options: int | float) -> SceneConversations:
        spec = ConversationSpec(purpose, **options)  # type: ignore[arg-type]
        images = self.cache.tiles if purpose == "joint" else self.features
        adapter = CheckpointTokenizer(self.tokenizer)
        return SceneConversations(self.cache, images, adapter, spec, image_tokens=IMAGE_TOKENS)

    def text(self, example: Example) -> str:
        return self.tokenizer.decode([token for token in example["tokens"].ids if token != IMAGE_TOKEN_ID])

    def learned(self, example: Example) -> str:
        return self.tokenizer.decode([label for label in example["tokens"].labels if label != IGNORE_LABEL])


@pytest.fixture
def conversations(
    scene_cache: SceneCache, features: npt.NDArray[np.float16], world_tokenizer: PreTrainedTokenizerFast
) -> Conversations:
    return Conversations(scene_cache, features, world_tokenizer)


@pytest.mark.parametrize("purpose", ["language", "align", "instruct", "joint"])
def test_an_index_always_gives_the_same_example(conversations: Conversations, purpose: Purpose) -> None:
    one, other = conversations.of(purpose)[5], conversations.of(purpose)[5]
    assert one["tokens"] == other["tokens"]
    assert (one["images"] == other["images"]).all()


def test_another_pass_asks_other_questions_about_the_same_scene(conversations: Conversations) -> None:
    dataset = conversations.of("instruct", passes=2)
    assert len(dataset) == 2 * SPEC.num_scenes
    assert dataset[1]["tokens"] != dataset[1 + SPEC.num_scenes]["tokens"]
    assert (dataset[1]["images"] == dataset[1 + SPEC.num_scenes]["images"]).all()


def test_alignment_learns_only_the_caption(conversations: Conversations, scene_cache: SceneCache) -> None:
    for index in range(4):
        example = conversations.of("align")[index]
        assert conversations.learned(example) == describe_scene(scene_cache.scene(index)) + "\n"
        assert example["tokens"].ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS


def test_language_has_the_caption_in_place_of_the_picture(
    conversations: Conversations, scene_cache: SceneCache
) -> None:
    for index in range(4):
        example = conversations.of("language")[index]
        assert IMAGE_TOKEN_ID not in example["tokens"].ids
        assert example["images"].shape == (0, IMAGE_TOKENS, HIDDEN)
        assert describe_scene(scene_cache.scene(index)) in conversations.text(example)


@pytest.mark.parametrize("together", [0.0, 1.0])
def test_instruction_examples_hold_one_picture_and_several_answers(
    conversations: Conversations, features: npt.NDArray[np.float16], together: float
) -> None:
    dataset = conversations.of("instruct", together=together)
    for index in range(8):
        example = dataset[index]
        assert example["tokens"].ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
        assert (example["images"].numpy() == features[index : index + 1]).all()
        assert conversations.learned(example).count("</s>") >= 3
        assert (max(example["tokens"].blocks) > 1) == (together == 0.0)


def test_joint_examples_carry_the_tile(conversations: Conversations, scene_cache: SceneCache) -> None:
    example = conversations.of("joint")[3]
    assert (example["images"].numpy() == scene_cache.tiles[3:4]).all()
    assert example["tokens"].ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS


def test_examples_stay_within_the_length(conversations: Conversations) -> None:
    for together in (0.0, 1.0):
        dataset = conversations.of("instruct", together=together, max_length=200)
        assert all(len(dataset[index]["tokens"].ids) <= 200 for index in range(SPEC.num_scenes))


def test_some_questions_come_without_a_picture(conversations: Conversations) -> None:
    dataset = conversations.of("instruct", passes=60)
    without = [example for index in range(len(dataset)) if not len((example := dataset[index])["images"])]
    assert 0 < len(without) < 0.05 * len(dataset)
    assert all(re.fullmatch(rf"\s*{NO_PICTURE}</s>", conversations.learned(example)) for example in without)
