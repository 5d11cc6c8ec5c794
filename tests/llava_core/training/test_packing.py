"""Packing many questions about one picture changes nothing: the model computes the same as for each one alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_core.checkpoints.load import LoadOptions, load_language_side
from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IGNORE_LABEL, IMAGE_TOKEN_ID, TokenizedPrompt
from llava_core.training.collate import collate
from llava_core.training.packing import Packed, common_prefix_length, pack_alone, pack_shared_prefix
from tests.tiny import IMAGE_TOKENS, VISION_HIDDEN

PREFIX = (1, *[IMAGE_TOKEN_ID] * IMAGE_TOKENS, 50)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def language(tiny_checkpoint: Path, request: pytest.FixtureRequest) -> LanguageSide:
    """The language side with each attention implementation, because they take masks in different forms."""
    return load_language_side(tiny_checkpoint, LoadOptions(dtype="float32"), attention=request.param)


def prompt(question: tuple[int, ...], answer: tuple[int, ...], prefix: tuple[int, ...] = PREFIX) -> TokenizedPrompt:
    ids = prefix + question + answer
    return TokenizedPrompt(ids, (IGNORE_LABEL,) * (len(ids) - len(answer)) + answer)


PROMPTS = [prompt((60, 61, 62), (70, 2)), prompt((60, 63), (71, 72, 73, 2)), prompt((64, 65), (74, 2))]


def losses(language: LanguageSide, packed: Packed, features: Tensor) -> list[float]:
    """Returns the loss of every supervised token, in order."""
    batch = collate([{"tokens": packed, "images": features}])
    with torch.inference_mode():
        logits = language(batch["ids"], list(batch["images"]), mask=batch["mask"], positions=batch["positions"])
    target = batch["labels"][0, 1:]
    each = torch.nn.functional.cross_entropy(logits[0, :-1], target, reduction="none", ignore_index=IGNORE_LABEL)
    return [float(value) for value in each[target != IGNORE_LABEL]]


def test_packed_losses_equal_those_of_separate_sequences(language: LanguageSide) -> None:
    features = torch.randn(1, IMAGE_TOKENS, VISION_HIDDEN, generator=torch.Generator().manual_seed(0))
    packed = losses(language, pack_shared_prefix(PROMPTS, max_length=100), features)
    alone = [loss for one in PROMPTS for loss in losses(language, pack_alone(one), features)]
    assert packed == pytest.approx(alone, abs=1e-4)


def test_no_token_sees_the_future(language: LanguageSide) -> None:
    """Otherwise the model would learn to copy answers it can already see: a low loss, but useless."""
    features = torch.randn(1, IMAGE_TOKENS, VISION_HIDDEN, generator=torch.Generator().manual_seed(0))
    ids = PROMPTS[0].ids

    def logits(last: int) -> Tensor:
        batch = collate([{"tokens": pack_alone(prompt((), (*ids[len(PREFIX) : -1], last))), "images": features}])
        with torch.inference_mode():
            return language(batch["ids"], list(features), mask=batch["mask"], positions=batch["positions"])[0, :-1]

    torch.testing.assert_close(logits(2), logits(99))


def test_the_prefix_is_kept_once() -> None:
    packed = pack_shared_prefix(PROMPTS, max_length=100)
    assert packed.ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
    assert len(packed.ids) == len(PREFIX) + sum(len(one.ids) - len(PREFIX) for one in PROMPTS)
    assert packed.blocks == (0,) * len(PREFIX) + (1,) * 5 + (2,) * 6 + (3,) * 4
    assert packed.positions[len(PREFIX) :][:5] == packed.positions[len(PREFIX) + 5 :][:5]


def test_every_answer_is_still_supervised() -> None:
    packed = pack_shared_prefix(PROMPTS, max_length=100)
    assert [label for label in packed.labels if label != IGNORE_LABEL] == [70, 2, 71, 72, 73, 2, 74, 2]


def test_questions_beyond_the_length_are_left_out() -> None:
    packed = pack_shared_prefix(PROMPTS, max_length=len(PREFIX) + 10)
    assert set(packed.blocks) == {0, 1, 3}
    assert len(packed.ids) <= len(PREFIX) + 10


def test_the_common_prefix_ends_before_the_token_that_predicts_an_answer() -> None:
    same_question = [prompt((60, 61), (70, 2)), prompt((60, 61), (70, 3))]
    assert common_prefix_length(same_question) == len(PREFIX) + 1


def test_a_prompt_packed_alone_is_a_single_block() -> None:
    packed = pack_alone(PROMPTS[0])
    assert packed.positions == tuple(range(len(PROMPTS[0].ids)))
    assert set(packed.blocks) == {0}
    assert (packed.ids, packed.labels) == (PROMPTS[0].ids, PROMPTS[0].labels)
