"""The language side equals transformers' LLaVA with and without pictures, with and without cache and padding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from llava_core.checkpoints.load import LoadOptions, load_language_side
from llava_core.images.preprocess import PreprocessConfig
from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.vision.clip import normalise
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS

BEFORE, AFTER = [1, 60, 70, 80], [81, 90, 100, 5]


@pytest.fixture(scope="module")
def language(tiny_checkpoint: Path) -> LanguageSide:
    return load_language_side(tiny_checkpoint, LoadOptions(dtype="float32"))


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    tiles = np.random.default_rng(3).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    return normalise(torch.from_numpy(tiles), PreprocessConfig(size=IMAGE_SIZE))


def prompt(image_token: int) -> torch.Tensor:
    image = [image_token] * IMAGE_TOKENS
    return torch.tensor([[*BEFORE, *image, 9, *image, *AFTER]])


@torch.inference_mode()
def features_of(reference: LlavaForConditionalGeneration, pixels: torch.Tensor) -> list[torch.Tensor]:
    hidden = reference.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    return list(hidden[:, 1:])


@torch.inference_mode()
def test_logits_equal_transformers_with_pictures(
    language: LanguageSide, reference_model: LlavaForConditionalGeneration, pixels: torch.Tensor
) -> None:
    expected = reference_model(input_ids=prompt(reference_model.config.image_token_id), pixel_values=pixels).logits
    got = language(prompt(IMAGE_TOKEN_ID), features_of(reference_model, pixels))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_logits_equal_transformers_without_pictures(
    language: LanguageSide, reference_model: LlavaForConditionalGeneration
) -> None:
    ids = torch.tensor([BEFORE + AFTER])
    torch.testing.assert_close(language(ids, []), reference_model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_cached_decoding_equals_a_single_pass(
    language: LanguageSide, reference_model: LlavaForConditionalGeneration, pixels: torch.Tensor
) -> None:
    ids, features = prompt(IMAGE_TOKEN_ID), features_of(reference_model, pixels)
    whole = language(ids, features)
    cache = DynamicCache()
    start = ids.shape[1] - 3
    steps = [language(ids[:, :start], features, cache)]
    steps += [language(ids[:, index : index + 1], [], cache) for index in range(start, ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]


@torch.inference_mode()
def test_last_only_gives_the_last_position(language: LanguageSide) -> None:
    ids = torch.tensor([BEFORE + AFTER])
    torch.testing.assert_close(language(ids, [], last_only=True), language(ids, [])[:, -1:])


@torch.inference_mode()
def test_padding_on_the_right_changes_nothing(language: LanguageSide) -> None:
    ids = torch.tensor([[*BEFORE, 0, 0, 0], [*BEFORE, 5, 6, 7]])
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    torch.testing.assert_close(language(ids, [], mask=mask)[:1, :4], language(ids[:1, :4], []), atol=1e-4, rtol=1e-4)


def test_embeddings_have_the_decoders_dtype(language: LanguageSide) -> None:
    features = [torch.zeros(IMAGE_TOKENS, 16, dtype=torch.float16)] * 2
    assert language.embed(prompt(IMAGE_TOKEN_ID), features).dtype == torch.float32


def test_the_wrong_number_of_features_is_an_error(language: LanguageSide) -> None:
    with pytest.raises(ValueError, match=f"{2 * IMAGE_TOKENS} image placeholders but {IMAGE_TOKENS}"):
        language(prompt(IMAGE_TOKEN_ID), [torch.zeros(IMAGE_TOKENS, 16)])
