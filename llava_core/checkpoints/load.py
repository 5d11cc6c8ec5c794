"""Loading by part: a tower or a language side, each reading only its own weights and missing none.

Modules are built on the meta device and filled by assignment; every key of the files is either loaded, belongs to
another part, or is a computed buffer, else loading fails. Knows nothing about serving.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn

from llava_core.checkpoints.describe import load_config, load_preprocess_config
from llava_core.checkpoints.files import find_tensors
from llava_core.checkpoints.keymaps import Part, from_llava_hf
from llava_core.errors import CheckpointError
from llava_core.models.language import LanguageSide
from llava_core.vision.clip import ClipTower

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


def load_tower(folder: Path, options: LoadOptions, *, attention: str = "sdpa") -> ClipTower:
    """The vision tower alone, in evaluation mode."""
    config = load_config(folder)
    preprocess = load_preprocess_config(folder)
    if preprocess.size != config.vision.image_size:
        raise CheckpointError(
            f"preprocessor_config.json makes tiles of {preprocess.size} pixels, "
            f"but the tower of config.json takes {config.vision.image_size}"
        )
    with init_empty_weights(include_buffers=False):
        tower = ClipTower(config.vision, preprocess, attention=attention)
    _fill(tower, read_part(folder, "tower"), folder, "tower", optional=frozenset())
    return tower.to(options.device, options.torch_dtype).eval()


def load_language_side(folder: Path, options: LoadOptions, *, attention: str = "sdpa") -> LanguageSide:
    """Projector and decoder, without the tower, in evaluation mode."""
    config = load_config(folder)
    with init_empty_weights(include_buffers=False):
        side = LanguageSide(config, attention=attention)
    tied = frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
    _fill(side.projector, read_part(folder, "projector"), folder, "projector", optional=frozenset())
    _fill(side.decoder, read_part(folder, "decoder"), folder, "decoder", optional=tied)
    side.decoder.tie_weights()
    return side.to(options.device, options.torch_dtype).eval()


def read_part(folder: Path, part: Part) -> dict[str, Tensor]:
    """One part's tensors under our names, memory-mapped. Raises CheckpointError for a key that no part accounts for."""
    by_file: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    unknown = []
    for name, file in find_tensors(folder).items():
        try:
            key = from_llava_hf(name)
        except KeyError:
            unknown.append(name)
            continue
        if key is not None and key.part == part:
            by_file[file].append((name, key.name))
    if unknown:
        raise CheckpointError(f"{folder} holds {len(unknown)} tensors of unknown purpose: {_first(unknown)}")
    loaded: dict[str, Tensor] = {}
    for file, names in by_file.items():
        with safe_open(file, "pt") as tensors:
            loaded.update({ours: tensors.get_tensor(theirs) for theirs, ours in names})
    return loaded


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], folder: Path, part: Part, *, optional: frozenset[str]
) -> None:
    """Assign every tensor; anything missing, left over or of another shape is an error."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = sorted(set(expected) - set(tensors) - optional)
    extra = sorted(set(tensors) - set(expected))
    if missing or extra:
        raise CheckpointError(
            f"{folder}: the {part} does not match config.json; "
            f"missing {len(missing)} ({_first(missing)}), unexpected {len(extra)} ({_first(extra)})"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{folder}: {part} tensor {name} has shape {tuple(tensor.shape)}, config.json says {expected[name]}"
            )
    module.load_state_dict(dict(tensors), strict=not optional, assign=True)


def _first(names: list[str], count: int = 10) -> str:
    shown = ", ".join(names[:count])
    return shown + (", ..." if len(names) > count else "") if names else "none"
