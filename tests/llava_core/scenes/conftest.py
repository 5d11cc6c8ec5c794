"""A tiny drawn world: a few scenes and a small tokenizer, all in this process."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llava_core.scenes import cache as cache_module
from llava_core.scenes.cache import CacheSpec, SceneCache, open_cache
from llava_core.scenes.tokenizer import train_tokenizer

SPEC = CacheSpec(seed=3, num_scenes=12, size=64, patch=16)


@pytest.fixture(scope="session")
def world_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(seed=0, num_scenes=150, vocab_size=400)


@pytest.fixture(autouse=True)
def _draw_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes costs more than drawing a dozen pictures."""

    def one_thread(_workers: int | None) -> Any:
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(cache_module, "ProcessPoolExecutor", one_thread)


@pytest.fixture
def scene_cache(tmp_path: Path) -> SceneCache:
    return open_cache(tmp_path / "pictures", SPEC)
