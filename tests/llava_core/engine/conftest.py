"""An engine over the tiny model in float32, and requests for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava_core.checkpoints.load import LoadOptions, load_language_side
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.config import EngineConfig
from llava_core.engine.engine import Engine
from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import EngineRequest, ImageFeatures, SamplingParams
from tests.tiny import IMAGE_TOKENS, VISION_HIDDEN


@pytest.fixture(scope="session")
def language_side(tiny_checkpoint: Path) -> LanguageSide:
    return load_language_side(tiny_checkpoint, LoadOptions(dtype="float32"))


@pytest.fixture
def build_engine(language_side: LanguageSide, tiny_checkpoint: Path) -> Callable[..., Engine]:
    return lambda **options: Engine(language_side, load_tokenizer(tiny_checkpoint), EngineConfig(**options))


def make_request(name: str, *, seed: int = 0, num_images: int = 1, **sampling: object) -> EngineRequest:
    """Makes a random prompt with random features, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 250, (12,), generator=generator).tolist()
    features = [
        ImageFeatures(f"{seed}-{i}", torch.randn(IMAGE_TOKENS, VISION_HIDDEN, generator=generator))
        for i in range(num_images)
    ]
    ids = [1, *text[:6], *([IMAGE_TOKEN_ID] * IMAGE_TOKENS * num_images), *text[6:]]
    return EngineRequest(name, ids, features, SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **sampling}))
