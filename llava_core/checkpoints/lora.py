"""LoRA matrices of an adapter, added to the weights they belong to while those are loaded, part by part.

Arithmetic and names are PEFT's; a test compares the two. Refuses every kind of adapter that it would compute wrongly.
Knows nothing about modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llava_core.checkpoints.contents import Stored
from llava_core.checkpoints.files import find_file, naming, read_json
from llava_core.checkpoints.headers import read_header
from llava_core.checkpoints.keymaps import Key, Part, from_wrapped
from llava_core.errors import CheckpointError
from llava_core.fields import Fields, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llava_core.checkpoints.tensors import TensorReader

Value = TypeVar("Value")
# PEFT's options under which an adapter is more than products of matrices, and their values under which it is not. Some
# ways of initialising change the base's weights, too.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "layer_replication": (),
    "monteclora_config": (),
}
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraPair:
    """The names in the adapter's file of one weight's two matrices, and the factor and the shape of their product."""

    down: str
    up: str
    scale: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Lora:
    """An adapter: pairs of matrices by the key of the weight they change, and whole tensors that replace others."""

    file: Path
    pairs: Mapping[Key, LoraPair]
    replaced: Mapping[Key, Stored]

    def apply(self, part: Part, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Replace a part's changed tensors in the dictionary; weights that LoRA changes become `dtype`.

        Raises CheckpointError where a weight is missing or of another shape, which means the wrong base.
        """
        # Imported here: names and factors need no torch, numbers do.
        from llava_core.checkpoints.tensors import TensorReader, read_tensors

        whole = {key.name: each.name for key, each in self.replaced.items() if key.part == part}
        loaded = read_tensors(dict.fromkeys(whole.values(), self.file))
        tensors.update({ours: loaded[name] for ours, name in whole.items()})
        reader = TensorReader()
        for key in self.pairs:
            if key.part == part:
                tensors[key.name] = self.change(key, tensors.get(key.name), reader).to(dtype)

    def change(self, key: Key, weight: Tensor | None, reader: TensorReader) -> Tensor:
        """A weight with the product of its matrices added, in float32. Raises CheckpointError as above."""
        if misfit := self.misfit(key, None if weight is None else tuple(weight.shape)):
            raise CheckpointError(misfit)
        assert weight is not None, key
        down, up = (reader.read(self.file, name).float() for name in (self.pairs[key].down, self.pairs[key].up))
        return weight.float() + (up @ down) * self.pairs[key].scale

    def misfit(self, key: Key, found: tuple[int, ...] | None) -> str | None:
        """What is wrong if the base has this weight in the shape `found`, or not at all; None where the pair fits."""
        shape = self.pairs[key].shape
        if found == shape:
            return None
        return (
            f"{self.file} changes {key.part} {key.name} of shape {shape}, but the base has {found or 'none'}: "
            "it is the wrong base, so name the right one with --base"
        )


def open_lora(folder: Path) -> Lora:
    """Read an adapter's names and factors. Raises CheckpointError naming the field if it is not plain LoRA."""
    with naming(folder / "adapter_config.json"):
        scaling = _read_scaling(Fields(read_json(folder, "adapter_config.json")))
    file = find_file(folder, "adapter_model")
    if file is None:
        raise CheckpointError(f"{folder} has an adapter_config.json but no adapter_model.safetensors or .bin")
    header = read_header(file)
    halves: dict[str, dict[str, str]] = {}
    replaced: dict[Key, Stored] = {}
    for name in header:
        match = _MATRIX.fullmatch(name)
        if match:
            halves.setdefault(match.group(1), {})[match.group(2)] = name
        elif "lora_" in name:
            raise CheckpointError(f"{file}: {name} is of a kind of LoRA that is not supported")
        elif key := _key(name, file):
            replaced[key] = Stored(file, name, header[name])
    pairs: dict[Key, LoraPair] = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"}:
            raise CheckpointError(f"{file}: {module} has lora_{''.join(half)} alone; both lora_A and lora_B are needed")
        key = _key(f"{module}.weight", file)
        assert key is not None, module
        rank = scaling.rank(module)
        down, up = header[half["A"]].shape, header[half["B"]].shape
        _check_ranks(down, up, rank, f"{file}: {module}")
        pairs[key] = LoraPair(half["A"], half["B"], scaling.factor(module), (up[0], down[1]))
    if not pairs:
        raise CheckpointError(f"{file} holds no LoRA matrices")
    return Lora(file, pairs, replaced)


def _key(name: str, file: Path) -> Key | None:
    try:
        return from_wrapped(name)
    except KeyError:
        raise CheckpointError(f"{file} holds a tensor of unknown purpose: {name}") from None


def _check_ranks(down: tuple[int, ...], up: tuple[int, ...], rank: int, what: str) -> None:
    if len(down) != 2 or len(up) != 2:
        raise CheckpointError(f"{what} has lora_A of shape {down} and lora_B of shape {up}, which are not matrices")
    if (down[0], up[1]) != (rank, rank):
        raise CheckpointError(
            f"{what} has matrices of rank {down[0]} and {up[1]}, adapter_config.json says {rank}; "
            "the two files are not of one adapter"
        )


@dataclass(frozen=True)
class _Scaling:
    """Rank and alpha of each module; patterns match the end of a module's path."""

    default_rank: int
    default_alpha: float
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]
    is_rank_stabilised: bool

    def rank(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.default_rank)

    def factor(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with `use_rslora`."""
        alpha, rank = _by_pattern(self.alphas, module, self.default_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


def _read_scaling(config: Fields) -> _Scaling:
    for field, plain in _PLAIN.items():
        if config.has(field) and config.values[field] not in plain:
            raise CheckpointError(
                f"{field} {shown(config.values[field])} is not supported; "
                "merge the adapter with the library that made it"
            )
    ranks, alphas = config.section("rank_pattern"), config.section("alpha_pattern")
    return _Scaling(
        default_rank=config.count("r"),
        default_alpha=config.positive("lora_alpha"),
        ranks={_pattern(ranks, key): ranks.count(key) for key in ranks.values},
        alphas={_pattern(alphas, key): alphas.positive(key) for key in alphas.values},
        is_rank_stabilised=config.flag("use_rslora", False),
    )


def _pattern(fields: Fields, key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{fields.path}{shown(key)} is not a regular expression: {error}") from error


def _by_pattern(patterns: Mapping[re.Pattern[str], Value], module: str, default: Value) -> Value:
    return next((value for pattern, value in patterns.items() if pattern.match(module)), default)
