"""Opens a safetensors file; every error in it becomes a CheckpointError that names it.

Needs no torch for names and headers. Knows nothing about what a file should hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from llava_core.checkpoints.access import denied
from llava_core.errors import CheckpointError


@contextmanager
def open_safetensors(file: Path, framework: Literal["np", "pt"]) -> Iterator[safe_open]:
    """Open the file for numpy or torch tensors; "pt" imports torch even to read only the header.

    Raises CheckpointError when the file is missing, unreadable or damaged, now or while it is read.
    """
    try:
        with safe_open(file, framework) as opened:
            yield opened
    except FileNotFoundError:
        # The library also raises this for a file that this user may not read.
        if file.exists():
            raise denied(file) from None
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or truncated ({error}); download it again") from error
