"""A checkpoint that was found and looked at once, and is opened by processes on whichever machine.

Looking takes a second and neither reads weights nor imports torch. Whatever this misses, such as memory that is lacking
where a process runs, the process that loads it finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.request_limits import RequestLimits

if TYPE_CHECKING:
    from llava_core.checkpoints.layout import Checkpoint


@dataclass(frozen=True)
class FoundCheckpoint:
    """Folders and hub ids, and the revision of each id.

    Not the folders that ids were found in: on another machine they are elsewhere, and may have to be fetched first. So
    may this project be, with the default model in it, which is None.
    """

    model: str | None
    base: str | None
    revisions: Mapping[str, str]
    offline: bool

    def open(self) -> Checkpoint:
        """What a part is loaded of. Raises CheckpointError when it cannot be had on this machine."""
        from llava_core.checkpoints.layout import open_checkpoint

        return open_checkpoint(_located(self.model), self.base, offline=self.offline, revisions=self.revisions)


def find_checkpoint(
    model: str | None,
    base: str | None = None,
    *,
    template: str | None = None,
    limits: RequestLimits | None = None,
    offline: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> FoundCheckpoint:
    """The checkpoint with base and tower, fetched if need be; None is the default model.

    Raises CheckpointError naming file and fix.
    """
    # A second's worth of tokenizer library, not wanted for a --help.
    from llava_core.checkpoints.accounting import check_loadable
    from llava_core.checkpoints.describe import load_preparer
    from llava_core.checkpoints.layout import open_checkpoint
    from llava_core.checkpoints.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(_located(model), base, offline=offline, revisions=revisions)
    tokenizer = load_tokenizer(checkpoint)
    load_preparer(checkpoint, tokenizer, template=template, limits=limits)
    check_loadable(checkpoint, tokenizer.num_tokens)
    return FoundCheckpoint(model, base, dict(checkpoint.revisions), offline)


def _located(model: str | None) -> str:
    return str(DEFAULT_MODEL) if model is None else model
