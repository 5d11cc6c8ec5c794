"""Makes written files survive a power failure. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Sync a file or folder to disk. After a power failure, a file that was not synced may be empty, and a file renamed
    in a folder that was not synced may have its old name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
