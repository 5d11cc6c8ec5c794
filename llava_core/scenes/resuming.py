"""Lets interrupted work resume: small files written atomically, and records of a folder's inputs.

Knows nothing about the work itself.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_core.errors import LlavaError


def write_whole(path: Path, text: str) -> None:
    """Write under another name first: an interruption leaves the old file or the new one, never half of one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.rename(path)


def claim(folder: Path, **inputs: Any) -> None:
    """Create the folder, and record in it the inputs of its content.

    Raises LlavaError when it holds content made from other inputs.
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
    """SHA-256 of a file, to identify its content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
