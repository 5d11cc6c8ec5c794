"""Reports files and folders that exist but that this user may not read, with the fix.

Knows nothing about their contents.
"""

import os
from pathlib import Path

from llava_core.errors import CheckpointError


def denied(path: Path) -> CheckpointError:
    """The error for a path that this user may not read."""
    return CheckpointError(f"{path} cannot be read: permission denied; give this user access to it")


def check_access(folder: Path) -> None:
    """Raise CheckpointError where this user may not read a folder, or enter one of its parents.

    Avoids Path's own methods, which raise inside such folders and for names that no folder can have.
    """
    for parent in reversed(folder.absolute().parents):
        if os.path.isdir(parent) and not os.access(parent, os.X_OK):
            raise denied(parent)
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise denied(folder)
