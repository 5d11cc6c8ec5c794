"""A checkpoint that has been found and checked once, to be opened by processes on any machine.

Checking takes a second and neither reads weights nor imports torch. The process that loads the checkpoint detects
anything else, such as a lack of memory on its machine.
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

    Does not hold the folders in which ids were found: on another machine those are elsewhere, and may have to be
    downloaded first. The same goes for the default model, which is None: this project may be installed elsewhere.
    """

    model: str | None
    base: str | None
    revisions: Mapping[str, str]
    offline: bool

    def open(self) -> Checkpoint:
        """Open the checkpoint to load its parts. Raises CheckpointError when it is not available on this machine."""
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
    """Find and check a checkpoint with its base and tower, downloading if need be; None is the default model.

    Raises CheckpointError naming file and fix.
    """
    # Imported here: the tokenizer library takes a second to import, too long for --help.
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
