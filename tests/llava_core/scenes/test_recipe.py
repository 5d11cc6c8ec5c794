"""The whole recipe in miniature: all stages run, the resulting checkpoint answers, an interruption costs one stage."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from llava_core.checkpoints.load import LoadOptions
from llava_core.errors import LlavaError
from llava_core.inference import LocalModel
from llava_core.scenes import recipe as recipe_module
from llava_core.scenes.recipe import STAGES, Recipe, StageSpec, build
from llava_core.scenes.samples import make_samples
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.tiny import edit_json

SMALL = StageSpec(steps=2, batch=2, learning_rate=1e-3)
TINY = Recipe(
    num_scenes=8,
    size=32,
    sharp_size=48,
    patch=16,
    hidden_size=64,
    num_layers=1,
    tower=SMALL,
    language=SMALL,
    align=SMALL,
    instruct=SMALL,
    joint=SMALL,
    sharpen=SMALL,
)

pytestmark = pytest.mark.timeout(180)


@dataclass
class Built:
    """A built model. `given` has each stage's training arguments, and whether a separate optimizer was passed."""

    work: Path
    out: Path
    given: dict[str, tuple[TrainingArguments, bool]]

    def copy_work(self, folder: Path) -> Path:
        """Copies the stages' results, so that a test can change them."""
        return Path(shutil.copytree(self.work, folder / "work"))


@pytest.fixture(scope="module", autouse=True)
def _without_compiling() -> Iterator[None]:
    """Skips compilation, which takes longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def built(_without_compiling: None, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Runs all stages once."""
    given: dict[str, tuple[TrainingArguments, bool]] = {}
    trainer, train = recipe_module.Trainer, recipe_module.train

    def record(model: nn.Module, arguments: TrainingArguments, **options: Any) -> Trainer:
        given["tower"] = (arguments, False)
        return trainer(model, arguments, **options)

    def record_training(language: Any, dataset: Any, arguments: TrainingArguments, **options: Any) -> Any:
        given[dataset.spec.purpose] = (arguments, options["optimizer"] is not None)
        return train(language, dataset, arguments, **options)

    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_module, "Trainer", record)
        patch.setattr(recipe_module, "train", record_training)
        build(TINY, folder / "work", folder / "model")
    return Built(folder / "work", folder / "model", given)


def test_the_recipe_builds_a_checkpoint_that_answers(built: Built) -> None:
    for stage in STAGES:
        assert json.loads((built.work / stage / "curve.json").read_text())
    assert (built.work / "loss.png").exists()
    model = LocalModel(built.out, options=LoadOptions(dtype="float32"))
    assert model.preparer.template.name == "vicuna_v1"
    (sample,) = make_samples(1)
    parts = (ImagePart(sample.image), TextPart(sample.question))
    request = GenerationRequest("r", (Message("user", parts),), SamplingParams(max_tokens=4))
    assert list(model.stream(request))[-1].usage is not None
    assert LlavaForConditionalGeneration.from_pretrained(built.out).config.image_token_index is not None


def test_adamw_is_configured_only_for_the_stage_that_uses_it(built: Built, tmp_path: Path) -> None:
    assert tuple(built.given) == STAGES
    default = TrainingArguments(output_dir=str(tmp_path))
    for arguments, has_its_own in built.given.values():
        for name in ("learning_rate", "weight_decay", "adam_beta2"):
            assert (getattr(arguments, name) == getattr(default, name)) == has_its_own
    assert built.given["tower"][0].learning_rate == SMALL.learning_rate


def test_finished_stages_are_not_run_again(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = built.copy_work(tmp_path)
    (work / "sharpen" / "weights.pt").unlink()
    ran: list[str] = []
    train = recipe_module.train

    def record(*arguments: object, **options: object) -> object:
        ran.append("trained")
        return train(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe_module, "train", record)
    monkeypatch.setattr(recipe_module, "Trainer", lambda *_, **__: pytest.fail("the tower was trained again"))
    build(TINY, work, tmp_path / "again")
    assert ran == ["trained"]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (built.out, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_a_stage_from_another_recipe_is_refused(built: Built, tmp_path: Path) -> None:
    work = built.copy_work(tmp_path)
    other = replace(TINY, align=replace(SMALL, learning_rate=2e-3))
    with pytest.raises(LlavaError, match=r"work/align was made by another recipe"):
        build(other, work, tmp_path / "other")
    for sizes in ({"hidden_size": 128}, {"num_layers": 2}):
        with pytest.raises(LlavaError, match=r"work/language was made by another recipe"):
            build(replace(TINY, **sizes), work, tmp_path / "other")
    sharper = replace(TINY, sharp_size=64)
    with pytest.raises(LlavaError, match=r"work/sharp_pictures was made by another recipe"):
        build(sharper, work, tmp_path / "other")
    shutil.rmtree(work / "sharp_pictures")
    with pytest.raises(LlavaError, match=r"work/sharpen was made by another recipe"):
        build(sharper, work, tmp_path / "other")
    tokenizer = work / "tokenizer" / "files" / "tokenizer.json"
    edit_json(tokenizer, lambda content: content["model"]["merges"].pop())
    with pytest.raises(LlavaError, match=r"work/language was made .* from something that has changed"):
        build(TINY, work, tmp_path / "other")
    weights = work / "tower" / "weights.pt"
    state = torch.load(weights, weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, weights)
    with pytest.raises(LlavaError, match=r"work/features was made .* from something that has changed"):
        build(TINY, work, tmp_path / "other")


def test_an_existing_result_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(LlavaError, match="out exists"):
        build(TINY, tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_a_scaled_recipe_changes_only_pictures_and_steps() -> None:
    full = Recipe()
    trial = full.scaled(0.01)
    assert trial.num_scenes == full.num_scenes // 100
    assert all(getattr(trial, name).steps < getattr(full, name).steps for name in STAGES)
    restored = {name: getattr(full, name) for name in STAGES}
    assert replace(trial, num_scenes=full.num_scenes, **restored) == full
    assert full.scaled(1.0) == full
