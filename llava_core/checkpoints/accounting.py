"""Checks that a checkpoint holds exactly what its config.json calls for, judging by headers, without torch.

For callers that must know before slow work begins, such as starting a service. Loading (load.py) checks again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_core.checkpoints.contents import Stored, stored_tensors
from llava_core.checkpoints.headers import DTYPES
from llava_core.checkpoints.keymaps import HEAD_KEY, NEWLINE_KEY, Key, Part
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.lora import Lora, open_lora
from llava_core.checkpoints.shapes import expected_shapes
from llava_core.config import ModelConfig
from llava_core.errors import CheckpointError

_LAYER = re.compile(r"layers\.(\d+)\.")


def check_loadable(checkpoint: Checkpoint, num_tokens: int) -> None:
    """Raise CheckpointError for every problem that loading would detect only after reading weights.

    `num_tokens` is the size of the tokenizer.
    """
    problems = tensor_problems(checkpoint, stored_tensors(checkpoint.weights))
    _raise(problems + vocabulary_problems(checkpoint, num_tokens))


def tensor_problems(checkpoint: Checkpoint, stored: Mapping[Key, Stored]) -> list[str]:
    """All problems with the names and shapes of the stored tensors, including the adapter's."""
    problems: list[str] = []
    replaced: Mapping[Key, Stored] = {}
    misfits: dict[Key, str] = {}
    if checkpoint.adapter is not None:
        try:
            lora = open_lora(checkpoint.adapter)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            misfits, replaced = _misfits(lora, stored), lora.replaced
    problems += [*misfits.values(), *name_problems(checkpoint, replaced)]
    others = {key: each for key, each in stored.items() if key not in misfits}
    return problems + shape_problems(checkpoint.config, {**others, **replaced})


def check_tensors(checkpoint: Path | Checkpoint) -> None:
    """Raise CheckpointError for damaged files, and for unknown, missing or left-over tensors; checks names only."""
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    _raise(name_problems(opened))


def check_shapes(config: ModelConfig, stored: Mapping[Key, Stored]) -> None:
    """Raise CheckpointError for tensors whose shape differs from config.json, and for integers; reads headers only."""
    _raise(shape_problems(config, stored))


def check_adapter(lora: Lora, stored: Mapping[Key, Stored]) -> None:
    """Raise CheckpointError for weights that the adapter changes but the base lacks or has in another shape."""
    _raise(list(_misfits(lora, stored).values()))


def _raise(problems: list[str], at_most: int = 5) -> None:
    if len(problems) > at_most:
        problems = [*problems[:at_most], f"and {len(problems) - at_most} more, which llava inspect lists"]
    if problems:
        raise CheckpointError("; ".join(problems))


def name_problems(checkpoint: Checkpoint, replaced: Iterable[Key] = ()) -> list[str]:
    """All tensors that are missing, left over, or of unknown purpose. Raises CheckpointError for damaged files.

    `replaced` are the tensors that an adapter holds in full.
    """
    names = set(replaced)
    problems = []
    for weights in checkpoint.weights:
        keys, unknown = weights.sorted_keys()
        names |= {key for key in keys.values() if key.part in weights.parts}
        if unknown:
            problems.append(f"{weights.folder} holds {len(unknown)} tensors of unknown purpose: {', '.join(unknown)}")
    expected, file = expected_shapes(checkpoint.config), checkpoint.folder / "config.json"
    for part in ("tower", "decoder"):
        problems += [f"{file} calls for {said}" for said in _layer_problems(part, names, expected)]
    problems += [f"{key.part} {key.name} is missing, which {file} calls for" for key in sorted(set(expected) - names)]
    left_over = sorted(names - set(expected) - {HEAD_KEY})
    return problems + [_left_over(key, checkpoint.config, file) for key in left_over]


def shape_problems(config: ModelConfig, stored: Mapping[Key, Stored]) -> list[str]:
    """All tensors whose shape differs from config.json, or whose numbers are integers, as of quantised weights."""
    expected = {HEAD_KEY: (config.vocab_size, config.hidden_size), **expected_shapes(config)}
    # Of some towers only the names are known here.
    wanted = {key: found for key, found in stored.items() if expected.get(key) is not None}
    return [
        f"{key.part} {key.name} has shape {found.info.shape} in {found.file}, config.json says {expected[key]}"
        for key, found in wanted.items()
        if expected[key] != found.info.shape
    ] + [
        f"{key.part} {key.name} in {found.file} holds numbers of type {DTYPES[found.info.dtype][0]}: weights stored "
        "quantised cannot be loaded; load the model that they were made from, with --quantization"
        for key, found in wanted.items()
        if not found.info.is_float
    ]


def _misfits(lora: Lora, stored: Mapping[Key, Stored]) -> dict[Key, str]:
    """A message for every weight that the adapter changes but the base lacks or has in another shape."""
    found = {key: stored[key].info.shape if key in stored else None for key in lora.pairs}
    return {key: misfit for key, shape in found.items() if (misfit := lora.misfit(key, shape))}


def vocabulary_problems(checkpoint: Checkpoint, num_tokens: int) -> list[str]:
    """A message if the tokenizer has tokens without a row in the embeddings."""
    rows = checkpoint.config.vocab_size
    if num_tokens <= rows:
        return []
    return [
        f"{checkpoint.text_folder}: the tokenizer has {num_tokens} tokens, but vocab_size in "
        f"{checkpoint.folder / 'config.json'} is {rows}; it is the tokenizer of another model, or the rows that "
        "training added are missing"
    ]


def _layer_problems(part: Part, names: Iterable[Key], expected: Iterable[Key]) -> list[str]:
    """One line for missing or surplus layers, which is clearer than the names of all their tensors."""
    found, wanted = _layers(part, names), _layers(part, expected)
    if found == wanted:
        return []
    differing = ", ".join(f"layer {layer}" for layer in sorted(found ^ wanted))
    kind = "missing" if wanted - found else "surplus"
    return [f"{len(wanted)} {part} layers, the files hold {len(found)}; {kind}: {differing}"]


def _layers(part: Part, keys: Iterable[Key]) -> set[int]:
    matches = (_LAYER.search(key.name) for key in keys if key.part == part)
    return {int(match.group(1)) for match in matches if match}


def _left_over(key: Key, config: ModelConfig, file: Path) -> str:
    if key == NEWLINE_KEY:
        return f"image_newline is present, which mm_patch_merge_type {config.merge_type} in {file} does not have"
    return f"{key.part} {key.name} is present, but {file} does not call for it"
