"""Supervised training: a tiny model memorises four examples, and an interruption does not change the weights."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from llava_core.checkpoints.load import LoadOptions, load_language_side, load_tower
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.models.language import LanguageSide
from llava_core.prompts.conversation import Turn
from llava_core.prompts.templates import get_template
from llava_core.prompts.tokenize import IGNORE_LABEL
from llava_core.training.collate import Example, collate
from llava_core.training.dataset import build_example
from llava_core.training.packing import pack_alone
from llava_core.training.sft import SupervisedModel, newest_checkpoint, set_trainable, train
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, VISION_HIDDEN


class FourExamples(Dataset[Example]):
    """A dataset of four pictures (random features or tiles) with one-word answers."""

    def __init__(self, folder: Path, *, tiles: bool = False) -> None:
        tokenizer, template = load_tokenizer(folder), get_template("mistral_instruct")
        generator = torch.Generator().manual_seed(0)
        self.examples: list[Example] = []
        for answer in ("red", "blue", "two", "star"):
            turns = [Turn("user", "<image>\n?"), Turn("assistant", answer)]
            prompt = build_example(turns, template, tokenizer, [IMAGE_TOKENS], max_length=200)
            images = torch.randn(1, IMAGE_TOKENS, VISION_HIDDEN, generator=generator)
            if tiles:
                shape = (1, IMAGE_SIZE, IMAGE_SIZE, 3)
                images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            self.examples.append({"tokens": pack_alone(prompt), "images": images})

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class StopAt(TrainerCallback):
    """Simulates an interruption: training ends after this step, with its checkpoint saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.fixture
def examples(tiny_checkpoint: Path) -> FourExamples:
    return FourExamples(tiny_checkpoint)


@pytest.fixture
def new_language(tiny_checkpoint: Path) -> Callable[[], LanguageSide]:
    return lambda: load_language_side(tiny_checkpoint, LoadOptions(dtype="float32"))


def arguments(folder: Path, steps: int, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(folder), max_steps=steps, **defaults | options)


def weights(language: LanguageSide) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in language.state_dict().items()}


def test_four_examples_are_memorised(
    examples: FourExamples, new_language: Callable[[], LanguageSide], tmp_path: Path
) -> None:
    language = new_language()
    history = train(language, examples, arguments(tmp_path, 60), stage="instruct")
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[0] > 1
    assert losses[-1] < 0.05
    batch = collate([examples[index] for index in range(4)])
    language.eval()
    with torch.inference_mode():
        logits = language(batch["ids"], list(batch["images"]), mask=batch["mask"], positions=batch["positions"])
    supervised = batch["labels"][:, 1:] != IGNORE_LABEL
    assert torch.equal(logits[:, :-1].argmax(-1)[supervised], batch["labels"][:, 1:][supervised])


def test_a_resumed_training_ends_with_the_same_weights(
    examples: FourExamples, new_language: Callable[[], LanguageSide], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    through = new_language()
    train(through, examples, arguments(tmp_path / "through", 6, **options), stage="instruct")
    stopped = new_language()
    broken = tmp_path / "broken"
    train(stopped, examples, arguments(broken, 6, **options), stage="instruct", callbacks=[StopAt(3)])
    assert newest_checkpoint(broken) == str(broken / "checkpoint-3")
    # As after a kill while the next one was being saved.
    (broken / "checkpoint-6").mkdir()
    (broken / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    resumed = new_language()
    history = train(resumed, examples, arguments(broken, 6, **options), stage="instruct")
    assert max(row["step"] for row in history) == 6
    expected, got = weights(through), weights(resumed)
    assert not torch.equal(weights(stopped)["projector.0.weight"], got["projector.0.weight"])
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_alignment_changes_only_the_projector(
    examples: FourExamples, new_language: Callable[[], LanguageSide], tmp_path: Path
) -> None:
    language = new_language()
    before = weights(language)
    train(language, examples, arguments(tmp_path, 2), stage="align")
    changed = {name for name, value in weights(language).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("projector.") for name in changed)


def test_a_given_tower_is_trained_too(
    tiny_checkpoint: Path,
    new_language: Callable[[], LanguageSide],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tower = load_tower(tiny_checkpoint, LoadOptions(dtype="float32"))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    train(
        new_language(), FourExamples(tiny_checkpoint, tiles=True), arguments(tmp_path, 2), stage="instruct", tower=tower
    )
    changed = {name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])}
    assert any("patch_embedding" in name for name in changed)
    assert any("layers.0.self_attn" in name for name in changed)
    assert [record.message.split(",")[0] for record in caplog.records if "M parameters" in record.message] == [
        "projector: trained",
        "decoder: trained",
        "tower: trained",
    ]


def test_a_batch_without_pictures_needs_no_tower(
    tiny_checkpoint: Path, new_language: Callable[[], LanguageSide]
) -> None:
    prompt = build_example(
        [Turn("user", "?"), Turn("assistant", "red")],
        get_template("mistral_instruct"),
        load_tokenizer(tiny_checkpoint),
        [],
        max_length=200,
    )
    batch = collate([{"tokens": pack_alone(prompt), "images": torch.zeros(0, IMAGE_SIZE, IMAGE_SIZE, 3)}])
    model = SupervisedModel(new_language(), load_tower(tiny_checkpoint, LoadOptions(dtype="float32")))
    assert model(**batch)["loss"].isfinite()


def test_instruction_tuning_trains_projector_and_decoder(new_language: Callable[[], LanguageSide]) -> None:
    language = new_language()
    set_trainable(language, "align")
    set_trainable(language, "instruct")
    assert all(parameter.requires_grad for parameter in language.parameters())


def test_a_batch_without_labels_is_an_error(examples: FourExamples, new_language: Callable[[], LanguageSide]) -> None:
    batch = collate([examples[0]])
    batch["labels"].fill_(IGNORE_LABEL)
    with pytest.raises(ValueError, match="no supervised token"):
        SupervisedModel(new_language())(**batch)


def test_a_folder_without_a_complete_checkpoint_has_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path) is None
    # Killed while it was written.
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"global_step":')
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
