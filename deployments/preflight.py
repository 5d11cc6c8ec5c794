"""Is there anything to serve? Looked at before replicas start, in a second, without reading weights or importing torch.

Whatever this misses, such as a tensor of the wrong shape, the replica that loads it finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.settings import AppArgs
from llava_core.checkpoints.files import resolve_checkpoint
from llava_core.errors import CheckpointError

if TYPE_CHECKING:
    from llava_core.checkpoints.layout import Checkpoint


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that was found once, for all replicas: `name` is what was asked for, `folder` where it lies.

    `base` is the one it is laid over, where the settings name one.
    """

    name: str
    folder: Path
    base: FoundCheckpoint | None = None

    def open(self) -> Checkpoint:
        """What a replica loads its part of. Raises CheckpointError when it is not on this machine."""
        from llava_core.checkpoints.layout import open_checkpoint

        return open_checkpoint(self.here(), self.base.here() if self.base else None)

    def here(self) -> Path:
        """The folder, or on a machine that does not share it, the same revision under the same name.

        Raises CheckpointError when there is neither.
        """
        if self.folder.is_dir():
            return self.folder
        found = resolve_checkpoint(self.name)
        # The hub's client names a snapshot's folder by its revision.
        if found.name != self.folder.name:
            raise CheckpointError(
                f"{self.name} is at revision {found.name} here and at {self.folder.name} where the service was "
                "planned; fetch it again on both machines, or give a folder that both share"
            )
        return found


def check_checkpoint(args: AppArgs) -> FoundCheckpoint:
    """The checkpoint, fetched if it is a hub id. Raises CheckpointError naming file and fix."""
    # A second's worth of tokenizer library, not wanted for a --help.
    from llava_core.checkpoints.accounting import check_tensors
    from llava_core.checkpoints.describe import load_preparer

    found = FoundCheckpoint(args.checkpoint, resolve_checkpoint(args.checkpoint), _find_base(args))
    checkpoint = found.open()
    load_preparer(checkpoint, template=args.template, limits=args.limits.request)
    check_tensors(checkpoint)
    return found


def _find_base(args: AppArgs) -> FoundCheckpoint | None:
    base = args.base_checkpoint
    return None if base is None else FoundCheckpoint(base, resolve_checkpoint(base))
