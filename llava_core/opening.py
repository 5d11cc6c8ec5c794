"""From a command's options to a model, in two steps: first everything that needs no weights, then the weights.

Shared by `llava ask` and `llava chat`. Only the second step imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llava_core.checkpoints.accounting import check_loadable
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.errors import CheckpointError
from llava_core.images.preprocess import PreprocessConfig
from llava_core.prepare import Preparer
from llava_core.prompts.templates import get_template
from llava_core.types import Quantization

if TYPE_CHECKING:
    from llava_core.checkpoints.load import Dtype
    from llava_core.checkpoints.tokenizer import CheckpointTokenizer
    from llava_core.inference import LocalModel


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded. None means the project's own model, or the checkpoint's setting."""

    model: str | None
    base: str | None
    template: str | None
    dtype: Dtype
    quantization: Quantization | None
    device: str
    offline: bool
    padding_jitter: bool


@dataclass(frozen=True)
class OpenedModel:
    """All that is known of a checkpoint before its weights are read."""

    checkpoint: Checkpoint
    tokenizer: CheckpointTokenizer
    preparer: Preparer


def open_model(options: ModelOptions) -> OpenedModel:
    """Open and check a checkpoint. Every error in it is raised here, before torch is imported or weights are read."""
    if options.template is not None:
        get_template(options.template)
    checkpoint = open_checkpoint(options.model or DEFAULT_MODEL, options.base, offline=options.offline)
    # Imported late: the tokenizer library is slow to import.
    from llava_core.checkpoints.describe import load_preparer
    from llava_core.checkpoints.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    preparer = load_preparer(checkpoint, tokenizer, template=options.template)
    if options.padding_jitter:
        preparer = _with_jitter(preparer)
    check_loadable(checkpoint, tokenizer.num_tokens)
    return OpenedModel(checkpoint, tokenizer, preparer)


def load_model(opened: OpenedModel, options: ModelOptions) -> LocalModel:
    """Read the weights."""
    from llava_core.checkpoints.load import LoadOptions
    from llava_core.inference import LocalModel

    load = LoadOptions(options.device, options.dtype, options.quantization)
    return LocalModel(opened.checkpoint, options=load, template=options.template, tokenizer=opened.tokenizer)


def _with_jitter(preparer: Preparer) -> Preparer:
    preprocess = preparer.preprocess
    if not isinstance(preprocess, PreprocessConfig):
        raise CheckpointError("--padding-jitter moves padding, which BioViL-T's pictures do not have; leave it out")
    return replace(preparer, preprocess=replace(preprocess, jitter=True))
