"""Is there anything to serve, and which models share a tower? Looked at before replicas start.

Looking takes a second and neither reads weights nor imports torch; comparing towers does both, where several models
might share one. Whatever this misses, such as memory that is lacking where a replica runs, the replica that loads it
finds.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.model_settings import ModelArgs
from deployments.settings import AppArgs
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.request_limits import RequestLimits

if TYPE_CHECKING:
    from llava_core.checkpoints.layout import Checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that was found once, for all replicas: folders and hub ids, and the revision of each id.

    Not the folders that ids were found in: on another machine they are elsewhere, and may have to be fetched first. So
    may this project be, with the default model in it, which is None.
    """

    model: str | None
    base: str | None
    revisions: Mapping[str, str]
    offline: bool

    def open(self) -> Checkpoint:
        """What a replica loads its part of. Raises CheckpointError when it cannot be had on this machine."""
        from llava_core.checkpoints.layout import open_checkpoint

        model = DEFAULT_MODEL if self.model is None else self.model
        return open_checkpoint(model, self.base, offline=self.offline, revisions=self.revisions)


def check_checkpoints(args: AppArgs) -> dict[str, FoundCheckpoint]:
    """The checkpoint of each model that has one, by the model's name, with base and tower, fetched if need be.

    Raises CheckpointError naming file and fix.
    """
    return {model.served_name: _check(model, args.limits.request, offline=args.offline) for model in args.own_models}


def _check(model: ModelArgs, limits: RequestLimits, *, offline: bool) -> FoundCheckpoint:
    # A second's worth of tokenizer library, not wanted for a --help.
    from llava_core.checkpoints.accounting import check_loadable
    from llava_core.checkpoints.describe import load_preparer
    from llava_core.checkpoints.layout import open_checkpoint
    from llava_core.checkpoints.tokenizer import load_tokenizer

    source, base = model.source, model.base_source
    checkpoint = open_checkpoint(source, base, offline=offline, revisions=model.revisions)
    tokenizer = load_tokenizer(checkpoint)
    load_preparer(checkpoint, tokenizer, template=model.template, limits=limits)
    check_loadable(checkpoint, tokenizer.num_tokens)
    return FoundCheckpoint(None if model.checkpoint is None else source, base, dict(checkpoint.revisions), offline)


def share_towers(args: AppArgs, found: Mapping[str, FoundCheckpoint]) -> dict[str, str]:
    """The name of the model whose tower each model uses, by the model's name: its own, or that of the first before it
    which has the same.

    The same is what has the same numbers, gives the same features for the same tiles, and is to run by the same
    settings. Raises CheckpointError where weights cannot be read.
    """
    by_settings: defaultdict[Hashable, list[str]] = defaultdict(list)
    # One tower is like no other's.
    for model in args.own_models if len(args.own_models) > 1 else ():
        settings = model.vision_encoder.model_dump_json()
        by_settings[settings, _tower_settings(found[model.served_name])].append(model.served_name)
    shared = {model.served_name: model.served_name for model in args.own_models}
    for names in by_settings.values():
        if len(names) > 1:
            shared |= _alike(names, found)
    return shared


def _tower_settings(found: FoundCheckpoint) -> str:
    from llava_core.checkpoints.tower_identity import tower_settings

    return tower_settings(found.open())


def _alike(names: list[str], found: Mapping[str, FoundCheckpoint]) -> dict[str, str]:
    """The first of these models with the same numbers, by name."""
    from llava_core.checkpoints.tower_identity import tower_digest

    began = time.perf_counter()
    first: dict[str, str] = {}
    shared = {name: first.setdefault(tower_digest(found[name].open()), name) for name in names}
    logger.info("the towers of %s are %d, compared in %.1f s", names, len(first), time.perf_counter() - began)
    return shared
