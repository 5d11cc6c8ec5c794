"""Which run the rows of an output belong to: its input, model, prompt and sampling. No other run may add rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.batch.errors import OutputError
from llava_core.checkpoints.layout import Checkpoint
from llava_core.disk import flush

# Of a larger file only the beginning and the end are hashed: weights that were trained further differ everywhere.
_WHOLE_BYTES = 1024 * 1024
_SUFFIXES = frozenset(".json .jinja .txt .model .safetensors .bin".split())


@dataclass(frozen=True)
class Manifest:
    """Identifies input and model by their content; their paths may change."""

    num_rows: int
    input: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)


def check_same(path: Path, manifest: Manifest, *, is_new: bool) -> None:
    """Write the manifest of a new output. Raises OutputError where another run's is there, naming the differences."""
    mine = json.loads(json.dumps(asdict(manifest)))
    if is_new:
        _write(path, mine)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path} does not say which run the existing rows belong to ({error}); name another output"
        ) from error
    different = sorted(_differences(there, mine))
    if different:
        raise OutputError(
            f"the output holds the rows of another run: {'; '.join(different)}. Name another output, or remove this one"
        )


def _differences(there: dict[str, Any], mine: dict[str, Any], path: str = "") -> Iterable[str]:
    for name in there.keys() | mine.keys():
        old, new = there.get(name), mine.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, "" if name == "settings" else f"{path}{name}.")
        elif old != new:
            is_digest = name in ("input", "model")
            yield f"{path}{name} {'is another one' if is_digest else f'was {old!r} and is {new!r}'}"


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def model_digest(checkpoint: Checkpoint) -> str:
    """Hash the names and contents of all files that the model is read from, including base and tower; large files
    without their middle."""
    digest = hashlib.sha256()
    weights = [file.parent for each in checkpoint.weights for file in each.files.values()]
    found = [checkpoint.folder, checkpoint.text_folder, checkpoint.image_folder, checkpoint.adapter, *weights]
    for folder in dict.fromkeys(folder for folder in found if folder is not None):
        for file in sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_WHOLE_BYTES))
                if size > _WHOLE_BYTES:
                    opened.seek(max(_WHOLE_BYTES, size - _WHOLE_BYTES), os.SEEK_SET)
                    digest.update(opened.read())
    return digest.hexdigest()
