"""Supervised fine-tuning in LLaVA's two stages, on transformers.Trainer: projector alignment, instruction tuning.

Trains the language side on features of a frozen tower, or tower and language side together. Logs by name which parts
are frozen and which are trained. Knows nothing about where examples come from.
"""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IGNORE_LABEL
from llava_core.training.collate import collate
from llava_core.vision.clip import ClipTower

logger = logging.getLogger(__name__)

Stage = Literal["align", "instruct"]
Collator = Callable[[list[Any]], dict[str, Any]]
MakeOptimizer = Callable[[nn.Module], Optimizer]


class SupervisedModel(nn.Module):
    """The trained model with a next-token loss over labelled positions, in the form Trainer expects. With a tower,
    images are tiles, else features."""

    def __init__(self, language: LanguageSide, tower: ClipTower | None = None) -> None:
        super().__init__()
        self.language = language
        self.tower = tower

    def forward(
        self, ids: Tensor, labels: Tensor, positions: Tensor, mask: Tensor, images: Tensor
    ) -> dict[str, Tensor]:
        """Shapes as in collate.Batch. Raises ValueError for a batch without a single label."""
        if not bool((labels != IGNORE_LABEL).any()):
            raise ValueError("the batch has no supervised token")
        features = images if self.tower is None or not len(images) else self.tower(images)
        logits = self.language(ids, list(features), mask=mask, positions=positions)
        targets = labels[:, 1:]
        supervised = targets != IGNORE_LABEL
        loss = nn.functional.cross_entropy(logits[:, :-1][supervised].float(), targets[supervised])
        return {"loss": loss}


def set_trainable(language: LanguageSide, stage: Stage, tower: ClipTower | None = None) -> None:
    """Freeze all that the stage does not train: `align` trains only the projector, `instruct` also the decoder. A tower
    is trained in either."""
    parts = {"projector": language.projector, "decoder": language.decoder, "tower": tower}
    for name, part in parts.items():
        if part is None:
            continue
        learns = stage == "instruct" or name != "decoder"
        part.requires_grad_(learns)
        count = sum(parameter.numel() for parameter in part.parameters())
        logger.info("%s: %s, %.2f M parameters", name, "trained" if learns else "frozen", count / 1e6)


def train(
    language: LanguageSide,
    dataset: Dataset[Any],
    arguments: TrainingArguments,
    *,
    stage: Stage,
    compiled_length: int | None = None,
    tower: ClipTower | None = None,
    optimizer: MakeOptimizer | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> list[dict[str, float]]:
    """Run one stage, resuming from the newest complete checkpoint in `arguments.output_dir`; returns Trainer's log
    history.

    `arguments` must have `remove_unused_columns=False`: examples are collated here. With `compiled_length` the decoder
    is compiled and batches are padded to multiples of it. A `tower` is trained too, on examples with tiles.
    `optimizer` builds an optimizer to replace the one that `arguments` name.
    """
    set_trainable(language, stage, tower)
    model = SupervisedModel(language, tower)
    if compiled_length is not None:
        language.decoder.base_model.compile(dynamic=False)
    trainer = Trainer(
        model,
        arguments,
        # Trainer's type asks for a plain dictionary, which a typed one is at run time.
        data_collator=cast("Collator", functools.partial(collate, multiple_of=compiled_length or 1)),
        train_dataset=dataset,
        callbacks=callbacks,
        optimizers=(optimizer(model) if optimizer else None, None),
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(Path(str(arguments.output_dir))))
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def newest_checkpoint(folder: Path) -> str | None:
    """The path of the newest complete checkpoint that Trainer left in this folder; one that was being saved when the
    process was killed is passed over."""
    steps = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if _is_complete(path))
    newest = max((int(step) for step in steps if step.isdecimal()), default=None)
    return None if newest is None else str(folder / f"checkpoint-{newest}")


def _is_complete(checkpoint: Path) -> bool:
    # Trainer writes this file last.
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True
