"""Loading by part: a tower or a language side, each reading only its own weights and missing none.

Modules are built on the meta device and filled by assignment; every key of the files is either loaded, belongs to
another part, or is a computed buffer, else loading fails. Tensors stored in the compute dtype stay mapped to their
files, others are converted a few at a time. Knows nothing about serving.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from llava_core.checkpoints.accounting import vocabulary_problems
from llava_core.checkpoints.describe import load_preprocess_config
from llava_core.checkpoints.keymaps import NEWLINE_KEY, Part
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.lora import open_lora
from llava_core.checkpoints.memory import MemoryNeed, check_fits, language_need, weight_bytes
from llava_core.checkpoints.tensors import read_tensors
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.checkpoints.weights import first
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError
from llava_core.kernels.attention import NAME as DENSE
from llava_core.kernels.attention import kept_dtype
from llava_core.models.language import LanguageSide
from llava_core.models.quantize import check_layers, check_quantization, quantize
from llava_core.types import Quantization
from llava_core.vision.towers import VisionTower, build_tower

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoadOptions:
    """Where and how precisely to compute. `auto`: bfloat16 where the device computes it natively, else float32.

    `quantization` stores the decoder's linear layers in fewer bits; tower, projector and all activations have the
    dtype. Raises CheckpointError for a device or a quantization that is not available here.
    """

    device: str = "cpu"
    dtype: Dtype = "auto"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantization)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise CheckpointError(f"device {self.device!r} is unknown; known are cpu, cuda and cuda:N")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise CheckpointError(f"device {self.device} calls for CUDA, and torch {torch.__version__} finds none")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The named dtype, or the one that `auto` stands for on this machine."""
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        if self.device.startswith("cuda"):
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_tower(checkpoint: Path | Checkpoint, options: LoadOptions, *, attention: str = DENSE) -> VisionTower:
    """Load only the vision tower, in evaluation mode."""
    opened = _open(checkpoint)
    config, preprocess = opened.config, load_preprocess_config(opened)
    with init_empty_weights(include_buffers=False):
        tower = build_tower(config.vision, preprocess, s2_scales=config.s2_scales, attention=attention)
    need = MemoryNeed(weight_bytes("tower", _shapes(tower), options.torch_dtype.itemsize))
    _check_fits(need, options.device, f"the tower of {opened.folder}")
    _fill(tower, read_part(opened, "tower", options.torch_dtype), opened, "tower", optional=frozenset())
    return tower.to(options.device, options.torch_dtype).eval()


def load_language_side(
    checkpoint: Path | Checkpoint, options: LoadOptions, *, num_tokens: int | None = None, attention: str = "sdpa"
) -> LanguageSide:
    """Load projector and decoder, without the tower, in evaluation mode.

    `num_tokens` is the size of the checkpoint's tokenizer, for callers that have loaded it already.
    """
    opened = _open(checkpoint)
    config, dtype = opened.config, options.torch_dtype
    with init_empty_weights(include_buffers=False):
        side = LanguageSide(config, attention=attention)
    if options.quantization:
        check_layers(side.decoder, options.quantization, device=options.device)
    _check_memory(side, opened, options)
    newline = read_part(opened, "newline", dtype)
    if set(newline) != ({NEWLINE_KEY.name} if config.has_newline else set()):
        raise CheckpointError(
            f"{opened.folder}: with mm_patch_merge_type {config.merge_type} the checkpoint must "
            f"{'' if config.has_newline else 'not '}hold image_newline, and it does{'' if newline else ' not'}"
        )
    if side.image_newline is not None:
        side.image_newline = _checked_newline(newline[NEWLINE_KEY.name], config.hidden_size, opened)
    _fill(side.projector, read_part(opened, "projector", dtype), opened, "projector", optional=frozenset())
    # Layers to be quantised one by one stay in their files until then.
    as_stored, tied = options.quantization is not None and opened.adapter is None, _tied(config)
    _fill(side.decoder, read_part(opened, "decoder", None if as_stored else dtype), opened, "decoder", optional=tied)
    side.decoder.tie_weights()
    _fit_vocabulary(side, opened, load_tokenizer(opened).num_tokens if num_tokens is None else num_tokens)
    if options.quantization:
        quantize(side.decoder, options.quantization, device=options.device, dtype=dtype)
    return side.to(options.device, dtype).eval()


def _check_memory(side: LanguageSide, checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Check that the weights fit on the device, and before that, with LoRA, the decoder in this machine's memory."""
    config, itemsize = checkpoint.config, options.torch_dtype.itemsize
    decoder = {name: shape for name, shape in _shapes(side.decoder).items() if name not in _tied(config)}
    weights = weight_bytes("decoder", decoder, itemsize, options.quantization)
    weights += weight_bytes("projector", _shapes(side.projector), itemsize)
    need = language_need(config, weights, kept_dtype(options.torch_dtype, options.device).itemsize)
    _check_fits(need, options.device, f"the language side of {checkpoint.folder}")
    if checkpoint.adapter is not None and (options.quantization or options.device != "cpu"):
        # At this point the whole decoder is in memory, not mapped to its files, whatever happens to it afterwards.
        whole = MemoryNeed(weight_bytes("decoder", decoder, itemsize))
        what = f"adding the LoRA of {checkpoint.adapter} to its base"
        _check_fits(whole, "cpu", what, advice="free some, or add it tensor by tensor with `llava merge` first")


def _check_fits(need: MemoryNeed, device: str, what: str, **advice: str) -> None:
    check_fits(need, device, what, **advice)
    logger.info("%s: %s", what, need)


def _tied(config: ModelConfig) -> frozenset[str]:
    """The decoder's tensors that share another one's memory under a second name, as in most files."""
    return frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _open(checkpoint: Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


def _checked_newline(tensor: Tensor, hidden_size: int, checkpoint: Checkpoint) -> nn.Parameter:
    if tuple(tensor.shape) != (hidden_size,):
        raise CheckpointError(
            f"{checkpoint.folder}: image_newline has shape {tuple(tensor.shape)}, config.json says {(hidden_size,)}"
        )
    return nn.Parameter(tensor)


def _fit_vocabulary(side: LanguageSide, checkpoint: Checkpoint, num_tokens: int) -> None:
    """Cut rows without a token, as the original code does, since they could be sampled; a token without a row is an
    error."""
    if problems := vocabulary_problems(checkpoint, num_tokens):
        raise CheckpointError(problems[0])
    if checkpoint.config.dialect == "original" and num_tokens < checkpoint.config.vocab_size:
        side.decoder.resize_token_embeddings(num_tokens)


def read_part(checkpoint: Path | Checkpoint, part: Part, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """One part's tensors under our names, in `dtype`; None: as stored, with those that LoRA changes in float32.

    Raises CheckpointError for a key that no part accounts for.
    """
    opened = _open(checkpoint)
    # LoRA is added to the stored weights, not to weights already rounded to `dtype`.
    early = dtype if opened.adapter is None else None
    loaded: dict[str, Tensor] = {}
    for weights in opened.weights:
        wanted = {name: key.name for name, key in weights.keys().items() if key.part == part}
        if part not in weights.parts:
            continue
        tensors = read_tensors({name: weights.files[name] for name in wanted}, None if weights.is_rounded else early)
        if weights.is_rounded:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        loaded.update({wanted[name]: tensor for name, tensor in tensors.items()})
    if opened.adapter is not None:
        open_lora(opened.adapter).apply(part, loaded, dtype or torch.float32)
    return loaded


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], checkpoint: Checkpoint, part: Part, *, optional: frozenset[str]
) -> None:
    """Assign every tensor; a missing, left-over or misshapen one, or one of integers, is an error."""
    state = module.state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    missing = sorted(set(expected) - set(tensors) - optional)
    extra = sorted(set(tensors) - set(expected))
    if missing or extra:
        raise CheckpointError(
            f"{checkpoint.folder}: the {part} does not match config.json; "
            f"missing {len(missing)} ({first(missing)}), unexpected {len(extra)} ({first(extra)})"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{checkpoint.folder}: {part} tensor {name} has shape {tuple(tensor.shape)}, "
                f"config.json says {expected[name]}"
            )
        if state[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"{checkpoint.folder}: {part} tensor {name} holds integers ({tensor.dtype})")
    module.load_state_dict(dict(tensors), strict=not optional, assign=True)
