"""Is there anything to serve? Looked at before replicas start, in a second, without reading weights or importing torch.

Whatever this misses, such as memory that is lacking where a replica runs, the replica that loads it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.settings import AppArgs

if TYPE_CHECKING:
    from llava_core.checkpoints.layout import Checkpoint


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that was found once, for all replicas: folders and hub ids, and the revision of each id.

    Not the folders that ids were found in: on another machine they are elsewhere, and may have to be fetched first.
    """

    model: str
    base: str | None
    revisions: Mapping[str, str]
    offline: bool

    def open(self) -> Checkpoint:
        """What a replica loads its part of. Raises CheckpointError when it cannot be had on this machine."""
        from llava_core.checkpoints.layout import open_checkpoint

        return open_checkpoint(self.model, self.base, offline=self.offline, revisions=self.revisions)


def check_checkpoint(args: AppArgs) -> FoundCheckpoint:
    """The checkpoint, with its base and its tower, fetched if need be. Raises CheckpointError naming file and fix."""
    # A second's worth of tokenizer library, not wanted for a --help.
    from llava_core.checkpoints.accounting import check_loadable
    from llava_core.checkpoints.describe import load_preparer
    from llava_core.checkpoints.layout import open_checkpoint
    from llava_core.checkpoints.tokenizer import load_tokenizer

    model, base = args.checkpoint, args.base_checkpoint
    checkpoint = open_checkpoint(model, base, offline=args.offline, revisions=args.revisions)
    tokenizer = load_tokenizer(checkpoint)
    load_preparer(checkpoint, tokenizer, template=args.template, limits=args.limits.request)
    check_loadable(checkpoint, tokenizer.num_tokens)
    return FoundCheckpoint(model, base, dict(checkpoint.revisions), args.offline)
