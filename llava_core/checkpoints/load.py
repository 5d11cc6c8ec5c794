"""Loading by part: a tower or a language side, each reading only its own weights and missing none.

Modules are built on the meta device and filled by assignment; every key of the files is either loaded, belongs to
another part, or is a computed buffer, else loading fails. Knows nothing about serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from llava_core.checkpoints.describe import load_preprocess_config
from llava_core.checkpoints.keymaps import NEWLINE_KEY, Part
from llava_core.checkpoints.layout import Checkpoint, first, open_checkpoint
from llava_core.checkpoints.lora import open_lora
from llava_core.checkpoints.tensors import read_tensors
from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.errors import CheckpointError
from llava_core.models.language import LanguageSide
from llava_core.vision.towers import VisionTower, build_tower

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoadOptions:
    """Where and how precisely to compute. `auto`: bfloat16 where the device computes it natively, else float32."""

    device: str = "cpu"
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `auto` stands for on this machine, or the one that was named."""
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]
        if self.device.startswith("cuda"):
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def load_tower(checkpoint: Path | Checkpoint, options: LoadOptions, *, attention: str = "sdpa") -> VisionTower:
    """The vision tower alone, in evaluation mode."""
    opened = _open(checkpoint)
    config, preprocess = opened.config, load_preprocess_config(opened)
    if preprocess.size != config.tile_size:
        raise CheckpointError(
            f"preprocessor_config.json makes tiles of {preprocess.size} pixels, "
            f"but the tower of config.json takes {config.tile_size}"
        )
    with init_empty_weights(include_buffers=False):
        tower = build_tower(config.vision, preprocess, s2_scales=config.s2_scales, attention=attention)
    _fill(tower, read_part(opened, "tower", options.torch_dtype), opened, "tower", optional=frozenset())
    return tower.to(options.device, options.torch_dtype).eval()


def load_language_side(checkpoint: Path | Checkpoint, options: LoadOptions, *, attention: str = "sdpa") -> LanguageSide:
    """Projector and decoder, without the tower, in evaluation mode."""
    opened = _open(checkpoint)
    config, dtype = opened.config, options.torch_dtype
    with init_empty_weights(include_buffers=False):
        side = LanguageSide(config, attention=attention)
    newline = read_part(opened, "newline", dtype)
    if set(newline) != ({NEWLINE_KEY.name} if config.has_newline else set()):
        raise CheckpointError(
            f"{opened.folder}: with mm_patch_merge_type {config.merge_type} the checkpoint must "
            f"{'' if config.has_newline else 'not '}hold image_newline, and it does{'' if newline else ' not'}"
        )
    if side.image_newline is not None:
        side.image_newline = _checked_newline(newline[NEWLINE_KEY.name], config.hidden_size, opened)
    tied = frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
    _fill(side.projector, read_part(opened, "projector", dtype), opened, "projector", optional=frozenset())
    _fill(side.decoder, read_part(opened, "decoder", dtype), opened, "decoder", optional=tied)
    side.decoder.tie_weights()
    _fit_vocabulary(side, opened)
    return side.to(options.device, dtype).eval()


def _open(checkpoint: Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


def _checked_newline(tensor: Tensor, hidden_size: int, checkpoint: Checkpoint) -> nn.Parameter:
    if tuple(tensor.shape) != (hidden_size,):
        raise CheckpointError(
            f"{checkpoint.folder}: image_newline has shape {tuple(tensor.shape)}, config.json says {(hidden_size,)}"
        )
    return nn.Parameter(tensor)


def _fit_vocabulary(side: LanguageSide, checkpoint: Checkpoint) -> None:
    """The original cuts rows that no token has, which could otherwise be drawn; a token without a row is an error."""
    num_tokens, rows = load_tokenizer(checkpoint).num_tokens, checkpoint.config.vocab_size
    if num_tokens > rows:
        raise CheckpointError(
            f"{checkpoint.text_folder}: the tokenizer has {num_tokens} tokens, but config.json's vocab_size is {rows}; "
            "it is the tokenizer of another model, or lacks the rows that training added"
        )
    if checkpoint.config.dialect == "original" and num_tokens < rows:
        side.decoder.resize_token_embeddings(num_tokens)


def read_part(checkpoint: Path | Checkpoint, part: Part, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One part's tensors under our names, memory-mapped where nothing changes them; LoRA is added in `dtype`.

    Raises CheckpointError for a key that no part accounts for.
    """
    opened = _open(checkpoint)
    loaded: dict[str, Tensor] = {}
    for weights in opened.weights:
        wanted = {name: key.name for name, key in weights.keys().items() if key.part == part}
        if part not in weights.parts:
            continue
        tensors = read_tensors({name: weights.files[name] for name in wanted})
        if weights.is_rounded:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        loaded.update({wanted[name]: tensor for name, tensor in tensors.items()})
    if opened.adapter is not None:
        open_lora(opened.adapter).apply(part, loaded, dtype)
    return loaded


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], checkpoint: Checkpoint, part: Part, *, optional: frozenset[str]
) -> None:
    """Assign every tensor; anything missing, left over or of another shape is an error."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
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
    module.load_state_dict(dict(tensors), strict=not optional, assign=True)
