"""What is written, kept through a loss of power. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """A file onto the disk, which may otherwise be empty under its name then; or a folder with the names in it, where
    what was renamed may otherwise have its old one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
