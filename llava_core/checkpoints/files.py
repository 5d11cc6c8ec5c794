"""A checkpoint's folder: its JSON files, and which weight file holds which tensor. Reads headers, not weights.

Knows nothing about models or where folders come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_core.checkpoints.access import denied
from llava_core.checkpoints.pickles import read_pickled
from llava_core.checkpoints.safetensors_file import open_safetensors
from llava_core.errors import CheckpointError

# The model that is served, asked and evaluated when no checkpoint is named.
DEFAULT_MODEL = Path(__file__).parents[1] / "default_model"


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the checkpoint's JSON objects. Raises CheckpointError naming a missing or damaged file."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder / name} is missing; is this a complete checkpoint?") from None
    except PermissionError:
        raise denied(folder / name) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder / name} must hold a JSON object, not {type(content).__name__}")
    return content


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Prefix the file's name to errors from readers of configurations, which know fields but no files."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


# The first that exists is used, as in transformers.
_MODELS = ("model.safetensors", "pytorch_model.bin")


def find_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from an index or a single file; safetensors before `.bin`.

    Raises CheckpointError for missing or damaged files, and when a safetensors index and headers disagree.
    """
    for name in _MODELS:
        if (index := folder / f"{name}.index.json").exists():
            return _find_listed(index)
        if (single := folder / name).exists():
            return dict.fromkeys(tensor_names(single), single)
    raise CheckpointError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json, nor pytorch_model.bin or its index"
    )


def _find_listed(index: Path) -> dict[str, Path]:
    listed = _read_index(index)
    files = sorted(set(listed.values()))
    if absent := [file for file in files if not file.exists()]:
        raise CheckpointError(
            f"{absent[0]} is missing, which weight_map in {index} names; the checkpoint is incomplete"
        )
    if index.name.startswith("pytorch"):
        # contents.py compares the index with these files' contents when it reads their headers.
        return listed
    found = {name: file for file in files for name in tensor_names(file)}
    if listed != found:
        wrong = sorted(set(listed.items()) ^ set(found.items()))[0][0]
        raise CheckpointError(f"{index} and its shards disagree, for example about {wrong}; download it again")
    return found


def has_model(folder: Path) -> bool:
    """Whether the folder holds a whole model's weights."""
    return any((folder / name).exists() for model in _MODELS for name in (model, f"{model}.index.json"))


def find_file(folder: Path, stem: str) -> Path | None:
    """`stem.safetensors` in a folder, or else `stem.bin`."""
    return next((file for suffix in ("safetensors", "bin") if (file := folder / f"{stem}.{suffix}").exists()), None)


def find_non_lora(folder: Path) -> Path | None:
    """The tensors that an original LoRA trained in full. Of RaDialog's two files, the extended one is used, as in its
    code."""
    return find_file(folder, "non_lora_trainables_extended") or find_file(folder, "non_lora_trainables")


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json(index.parent, index.name).get("weight_map")
    # A name with a folder in it would read files outside the checkpoint.
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{index}: weight_map must map every tensor to a file of the same folder")
    return {name: index.parent / file for name, file in weight_map.items()}


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value == Path(value).name != "" and len(value) < 256 and "\0" not in value


def tensor_names(file: Path) -> list[str]:
    """Tensor names in one weight file. Raises CheckpointError when it is missing, truncated or of another kind."""
    if file.suffix != ".safetensors":
        return list(read_pickled(file))
    with open_safetensors(file, "np") as tensors:
        return list(tensors.keys())
