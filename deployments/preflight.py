"""Checks before replicas start: do the checkpoints exist, and which models share a tower?

Checking takes a second and neither reads weights nor imports torch; comparing towers does both, where several models
might share one. What this cannot see, such as too little memory on a replica's node, fails in the replica that loads
the checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping

from deployments.settings.app import AppArgs
from llava_core.checkpoints.found import FoundCheckpoint, find_checkpoint

logger = logging.getLogger(__name__)


def check_checkpoints(args: AppArgs) -> dict[str, FoundCheckpoint]:
    """The checkpoint of each model that has one, with base and tower, by the model's name. Downloads what is missing.

    Raises CheckpointError naming file and fix.
    """
    return {
        model.served_name: find_checkpoint(
            None if model.checkpoint is None else model.source,
            model.base_source,
            template=model.template,
            limits=args.limits.request,
            offline=args.offline,
            revisions=model.revisions,
        )
        for model in args.own_models
    }


def share_towers(args: AppArgs, found: Mapping[str, FoundCheckpoint]) -> dict[str, str]:
    """Which model's tower each model uses, by name: its own, or that of the first model before it with the same tower.

    Two towers are the same when their weights are equal, they give the same features for the same tiles, and they are
    configured to run with the same settings. Raises CheckpointError when weights cannot be read.
    """
    by_settings: defaultdict[Hashable, list[str]] = defaultdict(list)
    # A single model has nothing to share with.
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
    """For each of these models, the first one whose tower has equal weights."""
    from llava_core.checkpoints.tower_identity import tower_digest

    began = time.perf_counter()
    first: dict[str, str] = {}
    shared = {name: first.setdefault(tower_digest(found[name].open()), name) for name in names}
    logger.info("the towers of %s are %d, compared in %.1f s", names, len(first), time.perf_counter() - began)
    return shared
