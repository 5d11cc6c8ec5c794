"""LoRA matrices of an adapter, added to the weights they belong to while those are loaded, part by part.

Arithmetic and names are PEFT's; a test compares the two. Refuses every kind of adapter it would get wrong. Knows
nothing about modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_core.checkpoints.files import find_file, read_json
from llava_core.checkpoints.headers import read_header
from llava_core.checkpoints.keymaps import Key, Part, from_wrapped
from llava_core.checkpoints.tensors import TensorReader, read_tensors
from llava_core.errors import CheckpointError

_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """Names, in the adapter's file, of the two matrices of one weight, and the factor of their product."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class Lora:
    """An adapter: matrices by the key of the weight they change, and whole tensors that replace others."""

    file: Path
    pairs: Mapping[Key, LoraPair]
    replaced: Mapping[Key, str]

    def apply(self, part: Part, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Change a part's tensors in place of the dictionary; what LoRA touches comes out in `dtype`.

        Raises CheckpointError where a weight is missing or of another shape: the base is the wrong one.
        """
        whole = {key.name: name for key, name in self.replaced.items() if key.part == part}
        loaded = read_tensors(dict.fromkeys(whole.values(), self.file))
        tensors.update({ours: loaded[name] for ours, name in whole.items()})
        reader = TensorReader()
        for key in self.pairs:
            if key.part == part:
                tensors[key.name] = self.change(key, tensors.get(key.name), reader).to(dtype)

    def change(self, key: Key, weight: Tensor | None, reader: TensorReader) -> Tensor:
        """A weight with the product of its matrices added, in float32. Raises CheckpointError as above."""
        down, up = (reader.read(self.file, name).float() for name in (self.pairs[key].down, self.pairs[key].up))
        shape = (up.shape[0], down.shape[1])
        if weight is None or tuple(weight.shape) != shape:
            found = "has none" if weight is None else f"has {tuple(weight.shape)}"
            raise CheckpointError(
                f"{self.file} changes {key.part} {key.name} of shape {shape}, but the base {found}; "
                "it is the wrong base, name the right one with --base"
            )
        return weight.float() + (up @ down) * self.pairs[key].scale


def open_lora(folder: Path) -> Lora:
    """An adapter's names and factors. Raises CheckpointError for a kind that is not plain LoRA, naming the field."""
    config = read_json(folder, "adapter_config.json")
    _check(config, folder)
    file = find_file(folder, "adapter_model")
    if file is None:
        raise CheckpointError(f"{folder} has an adapter_config.json but no adapter_model.safetensors or .bin")
    header = read_header(file)
    halves: dict[str, dict[str, str]] = {}
    replaced: dict[Key, str] = {}
    for name in header:
        match = _MATRIX.fullmatch(name)
        if match:
            halves.setdefault(match.group(1), {})[match.group(2)] = name
        elif "lora_" in name:
            raise CheckpointError(f"{file}: {name} is of a kind of LoRA that is not supported")
        elif key := _key(name, file):
            replaced[key] = name
    pairs: dict[Key, LoraPair] = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"}:
            raise CheckpointError(f"{file}: {module} has lora_{''.join(half)} alone; both lora_A and lora_B are needed")
        key = _key(f"{module}.weight", file)
        assert key is not None, module
        rank = int(_by_pattern(config.get("rank_pattern") or {}, module, config["r"]))
        ranks = header[half["A"]].shape[0], header[half["B"]].shape[-1]
        if ranks != (rank, rank):
            raise CheckpointError(
                f"{file}: {module} has matrices of rank {ranks[0]} and {ranks[1]}, adapter_config.json says {rank}; "
                "the two files are not of one adapter"
            )
        pairs[key] = LoraPair(half["A"], half["B"], _scale(config, module, rank))
    if not pairs:
        raise CheckpointError(f"{file} holds no LoRA matrices")
    return Lora(file, pairs, replaced)


def _key(name: str, file: Path) -> Key | None:
    try:
        return from_wrapped(name)
    except KeyError:
        raise CheckpointError(f"{file} holds a tensor of unknown purpose: {name}") from None


def _check(config: Mapping[str, Any], folder: Path) -> None:
    wanted = {"peft_type": ("LORA",), "use_dora": (False, None), "fan_in_fan_out": (False, None)}
    for field, allowed in wanted.items():
        if config.get(field, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{folder / 'adapter_config.json'}: {field} {config[field]!r} is not supported; "
                "merge the adapter with the library that made it"
            )
    if not isinstance(config.get("r"), int) or config["r"] < 1 or not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(f"{folder / 'adapter_config.json'}: r and lora_alpha must be positive numbers")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with `use_rslora`; patterns name modules by the end of their path."""
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
