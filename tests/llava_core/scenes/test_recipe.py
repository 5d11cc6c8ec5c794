"""The whole recipe in miniature: every stage runs, the result is a checkpoint that answers, a stop costs one stage."""

import json
import shutil
from dataclasses import replace
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


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than the rest."""
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)


def test_the_recipe_builds_a_checkpoint_that_answers(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "model"
    build(TINY, work, out)
    for stage in STAGES:
        assert json.loads((work / stage / "curve.json").read_text())
    assert (work / "loss.png").exists()
    model = LocalModel(out, options=LoadOptions(dtype="float32"))
    assert model.preparer.template.name == "vicuna_v1"
    (sample,) = make_samples(1)
    parts = (ImagePart(sample.image), TextPart(sample.question))
    request = GenerationRequest("r", (Message("user", parts),), SamplingParams(max_tokens=4))
    assert list(model.stream(request))[-1].usage is not None
    assert LlavaForConditionalGeneration.from_pretrained(out).config.image_token_index is not None


def test_finished_stages_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(TINY, tmp_path / "work", tmp_path / "one")
    (tmp_path / "work" / "sharpen" / "weights.pt").unlink()
    ran: list[str] = []
    train = recipe_module.train

    def record(*arguments: object, **options: object) -> object:
        ran.append("trained")
        return train(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe_module, "train", record)
    monkeypatch.setattr(recipe_module, "Trainer", lambda *_, **__: pytest.fail("the tower was trained again"))
    build(TINY, tmp_path / "work", tmp_path / "two")
    assert ran == ["trained"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_a_stage_made_otherwise_is_not_taken_for_this_one(tmp_path: Path) -> None:
    build(TINY, tmp_path / "work", tmp_path / "one")
    other = replace(TINY, align=replace(SMALL, learning_rate=2e-3))
    with pytest.raises(LlavaError, match=r"work/align was made by another recipe"):
        build(other, tmp_path / "work", tmp_path / "two")
    for sizes in ({"hidden_size": 128}, {"num_layers": 2}):
        with pytest.raises(LlavaError, match=r"work/language was made by another recipe"):
            build(replace(TINY, **sizes), tmp_path / "work", tmp_path / "two")
    sharper = replace(TINY, sharp_size=64)
    with pytest.raises(LlavaError, match=r"work/sharp_pictures was made by another recipe"):
        build(sharper, tmp_path / "work", tmp_path / "two")
    shutil.rmtree(tmp_path / "work" / "sharp_pictures")
    with pytest.raises(LlavaError, match=r"work/sharpen was made by another recipe"):
        build(sharper, tmp_path / "work", tmp_path / "two")
    tokenizer = tmp_path / "work" / "tokenizer" / "files" / "tokenizer.json"
    edit_json(tokenizer, lambda content: content["model"]["merges"].pop())
    with pytest.raises(LlavaError, match=r"work/language was made .* from something that has changed"):
        build(TINY, tmp_path / "work", tmp_path / "two")
    weights = tmp_path / "work" / "tower" / "weights.pt"
    state = torch.load(weights, weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, weights)
    with pytest.raises(LlavaError, match=r"work/features was made .* from something that has changed"):
        build(TINY, tmp_path / "work", tmp_path / "two")


def test_adamw_is_set_up_for_the_stage_that_uses_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, tuple[TrainingArguments, bool]] = {}
    trainer, train = recipe_module.Trainer, recipe_module.train

    def record(model: nn.Module, arguments: TrainingArguments, **options: Any) -> Trainer:
        given["tower"] = (arguments, False)
        return trainer(model, arguments, **options)

    def record_too(language: Any, dataset: Any, arguments: TrainingArguments, **options: Any) -> Any:
        given[dataset.spec.purpose] = (arguments, options["optimizer"] is not None)
        return train(language, dataset, arguments, **options)

    monkeypatch.setattr(recipe_module, "Trainer", record)
    monkeypatch.setattr(recipe_module, "train", record_too)
    build(TINY, tmp_path / "work", tmp_path / "out")
    assert tuple(given) == STAGES
    default = TrainingArguments(output_dir=str(tmp_path))
    for arguments, has_its_own in given.values():
        for name in ("learning_rate", "weight_decay", "adam_beta2"):
            assert (getattr(arguments, name) == getattr(default, name)) == has_its_own
    assert given["tower"][0].learning_rate == SMALL.learning_rate


def test_a_result_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(LlavaError, match="out exists"):
        build(TINY, tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_a_scaled_recipe_has_fewer_pictures_and_steps_and_is_the_same_otherwise() -> None:
    full = Recipe()
    trial = full.scaled(0.01)
    assert trial.num_scenes == full.num_scenes // 100
    assert all(getattr(trial, name).steps < getattr(full, name).steps for name in STAGES)
    restored = {name: getattr(full, name) for name in STAGES}
    assert replace(trial, num_scenes=full.num_scenes, **restored) == full
    assert full.scaled(1.0) == full
