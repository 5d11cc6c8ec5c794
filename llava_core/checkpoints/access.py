"""Files and folders that are there and that this user may not read: they are named, with what to do.

Knows nothing about what is in them.
"""

import os
from pathlib import Path

from llava_core.errors import CheckpointError


def denied(path: Path) -> CheckpointError:
    """The error for what may not be read."""
    return CheckpointError(f"{path} cannot be read: permission denied; give this user access to it")


def check_access(folder: Path) -> None:
    """Raise CheckpointError where this user may not look into a folder, or into one on the way to it.

    Not by Path's own questions, which raise inside such folders, and for names that no folder can have.
    """
    for parent in reversed(folder.absolute().parents):
        if os.path.isdir(parent) and not os.access(parent, os.X_OK):
            raise denied(parent)
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise denied(folder)
