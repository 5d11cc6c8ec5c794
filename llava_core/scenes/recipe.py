"""Trains the default model from scratch, in seeded stages, each of which resumes after an interruption.

    pictures → tower pretraining → features → language pretraining → projector alignment → instruction tuning → joint
    sharp pictures → sharpen

Alignment and instruction tuning are LLaVA's own stages (`training/sft.py`); those before stand in for the CLIP and
Vicuna that a real LLaVA starts from. In the last two, the tower also learns from questions, first unchanged, then on
larger tiles with its positions interpolated, as vision transformers are tuned for a higher resolution. Knows files and
order; the modules it calls do the work inside a stage.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from llava_core.checkpoints.tokenizer import CheckpointTokenizer
from llava_core.checkpoints.tools.save import save_llava_hf
from llava_core.checkpoints.tools.writing import new_folder
from llava_core.config import ModelConfig, read_llava_hf_config
from llava_core.errors import LlavaError
from llava_core.models.language import LanguageSide
from llava_core.scenes.cache import CacheSpec, SceneCache, open_cache
from llava_core.scenes.conversations import ConversationSpec, Purpose, SceneConversations
from llava_core.scenes.curve import draw_curves
from llava_core.scenes.features import open_features
from llava_core.scenes.pretrain_tower import PatchDataset, PatchNamer
from llava_core.scenes.resuming import claim, digest
from llava_core.scenes.tokenizer import train_tokenizer
from llava_core.scenes.tower import new_tower, resize_tower, tower_config, tower_words
from llava_core.training.optimizer import MuonAdamW
from llava_core.training.sft import newest_checkpoint, train
from llava_core.vision.clip import ClipTower

logger = logging.getLogger(__name__)

History = list[dict[str, float]]


STAGES = ("tower", "language", "align", "instruct", "joint", "sharpen")
_MUON_FACTOR = 6.0


@dataclass(frozen=True)
class StageSpec:
    """One training stage: optimizer steps, examples per step and AdamW's peak learning rate; Muon's is six times it."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result. `size` and `patch` are the tower's tile and patch sides in pixels,
    `sharp_size` is the tile side from the last stage on."""

    seed: int = 1
    num_scenes: int = 100_000
    size: int = 128
    sharp_size: int = 192
    patch: int = 16
    hidden_size: int = 192
    num_layers: int = 5
    tower: StageSpec = StageSpec(5000, 128, 1.5e-3)
    language: StageSpec = StageSpec(400, 32, 2e-3)
    align: StageSpec = StageSpec(200, 64, 2e-3)
    instruct: StageSpec = StageSpec(3000, 32, 2e-3)
    # A low rate: at 8e-4 the tower forgot faster than it learned, and the loss rose from 0.05 to 0.14.
    joint: StageSpec = StageSpec(1700, 32, 3e-4)
    sharpen: StageSpec = StageSpec(3000, 32, 4e-4)

    def scaled(self, factor: float) -> Recipe:
        """The same recipe with `factor` times the pictures and steps, for a trial run."""
        stages = {name: getattr(self, name) for name in STAGES}
        shorter = {name: replace(stage, steps=max(2, round(stage.steps * factor))) for name, stage in stages.items()}
        return replace(self, num_scenes=max(256, round(self.num_scenes * factor)), **shorter)


def build(recipe: Recipe, work: Path, out: Path) -> None:
    """Run every unfinished stage in `work`, then write the checkpoint to `out` and the curves to `work`.

    Raises LlavaError when `out` exists, or when `work` holds a stage of another recipe or built from other weights.
    """
    if out.exists():
        raise LlavaError(f"{out} exists; choose another folder or remove it")
    spec = CacheSpec(recipe.seed, recipe.num_scenes, recipe.size, recipe.patch)
    cache = open_cache(work / "pictures", spec)
    tower = _pretrain_tower(recipe, cache, work)
    made_from = {"tower": digest(work / "tower" / "weights.pt")}
    claim(work / "features", **made_from)
    features = open_features(work / "features", cache, tower)
    tokenizer, made_from["tokenizer"] = _tokenizer(recipe, work)
    torch.manual_seed(recipe.seed)
    language = LanguageSide(model_config(recipe, tokenizer), attention="eager")
    adapter = CheckpointTokenizer(tokenizer)
    frozen: dict[Purpose, StageSpec] = {
        "language": recipe.language,
        "align": recipe.align,
        "instruct": recipe.instruct,
    }
    for purpose, stage in frozen.items():
        dataset = _dataset(cache, features, adapter, purpose, stage)
        made_from = _train_stage(recipe, work, language, None, dataset, stage, made_from)
    dataset = _dataset(cache, cache.tiles, adapter, "joint", recipe.joint)
    made_from = _train_stage(recipe, work, language, tower, dataset, recipe.joint, made_from)
    sharp = open_cache(work / "sharp_pictures", sharp_spec(recipe))
    tower = resize_tower(tower, recipe.sharp_size)
    language.config = replace(language.config, vision=tower.config)
    dataset = _dataset(sharp, sharp.tiles, adapter, "sharpen", recipe.sharpen)
    _train_stage(recipe, work, language, tower, dataset, recipe.sharpen, made_from)
    draw_curves({name: _curve(work / name) for name in STAGES}, work / "loss.png")
    save_llava_hf(out, tower, language, tokenizer)
    logger.info("the checkpoint is in %s, the loss curves in %s", out, work / "loss.png")


def sharp_spec(recipe: Recipe) -> CacheSpec:
    """New pictures for the last stage: more of them with text, and more of the text real words and numbers."""
    return CacheSpec(
        recipe.seed + 1, recipe.num_scenes, recipe.sharp_size, recipe.patch, with_text=0.7, random_letters=0.2
    )


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> ModelConfig:
    """The default model's configuration before the last stage, in the form of its config.json."""
    return read_llava_hf_config(
        {
            "vision_config": tower_words(recipe.size, recipe.patch),
            "vision_feature_layer": -1,
            "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
            "text_config": {
                "model_type": "llama",
                "vocab_size": len(tokenizer),
                "hidden_size": recipe.hidden_size,
                "intermediate_size": recipe.hidden_size * 8 // 3,
                "num_hidden_layers": recipe.num_layers,
                "num_attention_heads": recipe.hidden_size // 64,
                "num_key_value_heads": recipe.hidden_size // 64,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-5,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "tie_word_embeddings": False,
            },
        }
    )


def _pretrain_tower(recipe: Recipe, cache: SceneCache, work: Path) -> ClipTower:
    torch.manual_seed(recipe.seed)
    config = tower_config(recipe.size, recipe.patch)
    namer = PatchNamer(config)
    weights = work / "tower" / "weights.pt"
    claim(work / "tower", seed=recipe.seed, stage=asdict(recipe.tower), pictures=asdict(cache.spec))
    if not weights.exists():
        adamw = {"learning_rate": recipe.tower.learning_rate, "weight_decay": 0.05, "adam_beta2": 0.98}
        arguments = _arguments(recipe, work / "tower", recipe.tower, optim="adamw_torch_fused", **adamw)
        trainer = Trainer(namer, arguments, train_dataset=PatchDataset(cache))
        trainer.train(resume_from_checkpoint=newest_checkpoint(work / "tower"))
        _finish(work / "tower", namer, trainer.state.log_history)
    namer.load_state_dict(torch.load(weights, weights_only=True))
    tower = new_tower(recipe.size, recipe.patch)
    tower.model.load_state_dict(namer.tower.state_dict())
    return tower.eval()


def _train_stage(
    recipe: Recipe,
    work: Path,
    language: LanguageSide,
    tower: ClipTower | None,
    dataset: SceneConversations,
    stage: StageSpec,
    made_from: dict[str, str],
) -> dict[str, str]:
    """Train one stage unless it is done, leave its weights in the modules, and return the next stage's inputs."""
    purpose = dataset.spec.purpose
    folder = work / purpose
    # The sizes that determine the result; everything else is in the weights that the stage starts from.
    sizes = {"decoder": dict(language.config.text), "pictures": asdict(dataset.cache.spec)}
    claim(folder, seed=recipe.seed, stage=asdict(stage), made_from=made_from, **sizes)
    weights = folder / "weights.pt"
    learning: nn.Module = language if tower is None else nn.ModuleDict({"language": language, "tower": tower})
    if not weights.exists():
        torch.manual_seed(recipe.seed)
        history = train(
            language,
            dataset,
            _arguments(recipe, folder, stage),
            stage="align" if purpose == "align" else "instruct",
            tower=tower,
            optimizer=functools.partial(_optimizer, learning_rate=stage.learning_rate),
            compiled_length=dataset.spec.max_length if purpose != "align" else 192,
        )
        _finish(folder, learning, history)
    learning.load_state_dict(torch.load(weights, weights_only=True))
    return {purpose: digest(weights)}


def _optimizer(model: nn.Module, learning_rate: float) -> MuonAdamW:
    return MuonAdamW(
        model, learning_rate=learning_rate, muon_learning_rate=_MUON_FACTOR * learning_rate, weight_decay=0.02
    )


def _dataset(
    cache: SceneCache,
    images: npt.NDArray[np.float16] | npt.NDArray[np.uint8],
    tokenizer: CheckpointTokenizer,
    purpose: Purpose,
    stage: StageSpec,
) -> SceneConversations:
    passes = -(-stage.steps * stage.batch // len(images))
    image_tokens = cache.spec.grid**2
    spec = ConversationSpec(purpose, passes=passes, max_length=256 + image_tokens)
    return SceneConversations(cache, images, tokenizer, spec, image_tokens=image_tokens)


def _arguments(recipe: Recipe, folder: Path, stage: StageSpec, **optimizer: Any) -> TrainingArguments:
    """Trainer's arguments. `optimizer` selects an optimizer and its settings, for stages that do not pass their own,
    which would ignore them."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, stage.steps // 10),
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not on_gpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_drop_last=True,
        dataloader_num_workers=8 if on_gpu else 0,
        remove_unused_columns=False,
        logging_steps=max(1, min(25, stage.steps // 4)),
        save_steps=200,
        save_total_limit=2,
        report_to=[],
        **optimizer,
    )


def _tokenizer(recipe: Recipe, work: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer, trained now if it does not exist, and its digest."""
    inputs = {"seed": recipe.seed, "num_scenes": min(20_000, recipe.num_scenes)}
    claim(work / "tokenizer", **inputs)
    folder = work / "tokenizer" / "files"
    if not folder.exists():
        with new_folder(folder) as new:
            train_tokenizer(**inputs).save_pretrained(new)
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return loaded, digest(folder / "tokenizer.json")


def _finish(folder: Path, model: nn.Module, history: History) -> None:
    """Save the weights and the curve; the file of weights marks the stage as done."""
    (folder / "curve.json").write_text(json.dumps([row for row in history if "loss" in row]))
    torch.save(model.state_dict(), folder / "weights.pt.partial")
    (folder / "weights.pt.partial").rename(folder / "weights.pt")


def _curve(folder: Path) -> list[tuple[float, float]]:
    rows = json.loads((folder / "curve.json").read_text())
    return [(float(row["step"]), float(np.float64(row["loss"]))) for row in rows]
