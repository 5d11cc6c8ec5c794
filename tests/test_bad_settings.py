"""Any field of any JSON file of a checkpoint may be wrong: it still loads, or the error names file and field."""

import logging
from collections.abc import Iterator

import pytest
from transformers import LlavaForConditionalGeneration

from llava_core.checkpoints.accounting import check_loadable
from llava_core.checkpoints.describe import load_preparer
from llava_core.checkpoints.layout import open_checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.errors import CheckpointError
from tests.bad_settings import Layout, cases, fault, write_layouts

NAMES = ("llava-hf", "original", "mistral", "two scales", "projector", "LoRA", "RaDialog", "PEFT adapter")
# Try only every STEP-th way for a field to be wrong; 1 tries all of them, which takes minutes.
STEP = 19


@pytest.fixture(scope="module")
def layouts(
    reference_model: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Layout]:
    return write_layouts(tmp_path_factory.mktemp("layouts"), reference_model)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence transformers, which warns of everything unexpected, thousands of times."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def check_layout(layout: Layout) -> None:
    """Check everything that is checked before weights are read."""
    checkpoint = open_checkpoint(layout.folder, layout.base, offline=True)
    tokenizer = load_tokenizer(checkpoint)
    load_preparer(checkpoint, tokenizer, template="vicuna_v1")
    check_loadable(checkpoint, tokenizer.num_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_field_is_harmless_or_named_in_the_error(layouts: dict[str, Layout], name: str) -> None:
    layout = layouts[name]
    check_layout(layout)
    # The step and the number of ways have no common divisor, so every way is tried on some field.
    some = list(cases(layout))[NAMES.index(name) :: STEP]
    faults = [fault(case, lambda: check_layout(layout), CheckpointError) for case in some]
    assert [each for each in faults if each] == []


def test_every_layout_and_file_is_covered(layouts: dict[str, Layout]) -> None:
    assert set(layouts) == set(NAMES)
    files = {path.name for layout in layouts.values() for path in layout.root.rglob("*.json")}
    assert files == {
        "adapter_config.json",
        "added_tokens.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "pytorch_model.bin.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    # The fields of the layouts are covered: one of each kind that a table has.
    tried = {case.way for layout in layouts.values() for case in cases(layout)}
    assert {("num_attention_heads",), ("text_config", "rope_scaling"), ("vision_config", "image_size")} <= tried
    assert {("crop_size", "height"), ("alpha_pattern", "q_proj"), ("weight_map", "lm_head.weight")} <= tried
