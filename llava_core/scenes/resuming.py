"""What lets interrupted work go on: small files written whole, and notes of what a folder was made from.

Knows nothing about what is made.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_core.errors import LlavaError


def write_whole(path: Path, text: str) -> None:
    """Under another name first: a stop leaves the old file or the new one, never half of one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)


def claim(folder: Path, **inputs: Any) -> None:
    """Make the folder, and note in it what its content is made from.

    Raises LlavaError when it holds something that was made from something else.
    """
    note, text = folder / "inputs.json", json.dumps(inputs, sort_keys=True, indent=1)
    if note.exists() and note.read_text() != text:
        raise LlavaError(
            f"{folder} was made by another recipe, or from something that has changed since; "
            "remove it, or choose another folder with --work"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(note, text)


def digest(file: Path) -> str:
    """SHA-256 of a file, to tell its content from any other."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
