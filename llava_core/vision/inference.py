"""Prepares a tower for inference only.

Afterwards it cannot be trained or saved. Knows nothing about files or replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers.activations import QuickGELUActivation

from llava_core.kernels.packed import pack_linears
from llava_core.vision.clip import ClipTower
from llava_core.vision.siglip import SiglipTower
from llava_core.vision.towers import VisionTower


def ready_tower(tower: VisionTower) -> None:
    """Drop the layers after the select layer, and pack the weights of the others."""
    if isinstance(tower, ClipTower | SiglipTower):
        _drop_unread_layers(tower)
        if tower.model.device.type == "cuda":
            _join_operations(_encoder(tower))
    pack_linears(tower)


def call_before_layers(tower: VisionTower, call: Callable[[], None]) -> None:
    """Have `call` called while the tower computes: before each layer, or once per run where there are no layers."""
    parts = _encoder(tower).layers if isinstance(tower, ClipTower | SiglipTower) else [tower]
    for part in parts:
        part.register_forward_pre_hook(lambda *_: call())


def _encoder(tower: ClipTower | SiglipTower) -> Any:
    # Some versions of transformers wrap the encoder in another module.
    return getattr(tower.model, "vision_model", tower.model).encoder


def _join_operations(encoder: Any) -> None:
    """Fuse CLIP's activation: in torch it is three operations, which take half as long as the products around them."""
    # Triton is installed wherever CUDA is.
    from llava_core.kernels.layer_gpu import QuickGelu

    for layer in encoder.layers:
        if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
            layer.mlp.activation_fn = QuickGelu()


def _drop_unread_layers(tower: ClipTower | SiglipTower) -> None:
    encoder = _encoder(tower)
    # The first of the hidden states is the input of the first layer.
    num_read = range(len(encoder.layers) + 1)[tower.config.select_layer]
    # Keep at least one layer: transformers collects the hidden states where it calls layers.
    encoder.layers = torch.nn.ModuleList(encoder.layers[: max(1, num_read)])
    tower.config = replace(tower.config, select_layer=num_read)
