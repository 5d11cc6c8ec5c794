"""Identifies a checkpoint's vision tower by its contents and never by a name: equal identities mean equal features.

First by settings, which costs nothing; then by the weights, all of which are read. Knows nothing about sharing.
"""

from __future__ import annotations

import hashlib
from typing import Any

from llava_core.checkpoints.describe import load_preprocess_config
from llava_core.checkpoints.layout import Checkpoint
from llava_core.images.biovil import BioVilPreprocessConfig

# Fields of a tower's configuration that only training, or other models, use.
_WITHOUT_EFFECT = frozenset({"attention_dropout", "initializer_factor", "initializer_range", "projection_dim"})


def tower_settings(checkpoint: Checkpoint) -> str:
    """Everything that features depend on besides tiles, weights and precision, as text. Imports no torch."""
    config, preprocess = checkpoint.config, load_preprocess_config(checkpoint)
    vision = config.vision
    architecture = {name: value for name, value in vision.architecture.items() if name not in _WITHOUT_EFFECT}
    settings: dict[str, Any] = {
        "architecture": sorted(architecture.items()),
        "select_layer": _from_the_front(vision.select_layer, architecture),
        "select_feature": vision.select_feature,
        "scales": sorted(config.s2_scales),
        # The tower does not depend on how tiles are made, but it normalises them.
        "normalisation": None if isinstance(preprocess, BioVilPreprocessConfig) else (preprocess.mean, preprocess.std),
    }
    return repr(settings)


def _from_the_front(layer: int, architecture: dict[str, Any]) -> int:
    """The layer's index from the front: -2 of 24 layers is 23, since the embeddings count too."""
    return layer + architecture["num_hidden_layers"] + 1 if layer < 0 and "num_hidden_layers" in architecture else layer


def tower_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of the settings and of every number of the tower, as float32, whatever its files and precision.

    Raises CheckpointError as loading does.
    """
    # Imported here: models whose settings differ are distinguished without torch.
    import torch

    from llava_core.checkpoints.load import read_part

    digest = hashlib.sha256(tower_settings(checkpoint).encode())
    for name, tensor in sorted(read_part(checkpoint, "tower").items()):
        digest.update(repr((name, tuple(tensor.shape))).encode())
        # One at a time: the tensors are mapped to their files, and only this one is copied.
        digest.update(tensor.to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
