"""Projectors: tower features to decoder embeddings. Knows nothing about towers, decoders or files."""

import re

from torch import Tensor, nn

from llava_core.errors import CheckpointError


class Projector(nn.Sequential):
    """`linear`, `mlp<N>x_gelu` (N linear layers with GELU between) or `identity`, as LLaVA's `mm_projector_type`.

    A sequence, so its parameters are named 0.weight, 2.weight, ... as in the original checkpoints.
    """

    def __init__(self, kind: str, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(*_layers(kind, in_features, out_features, bias=bias))

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        for layer in self:
            features = layer(features)
        return features


def _layers(kind: str, in_features: int, out_features: int, *, bias: bool) -> list[nn.Module]:
    if kind == "identity":
        if in_features != out_features:
            raise CheckpointError(f"an identity projector cannot turn {in_features} features into {out_features}")
        return []
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if kind != "linear" and match is None:
        raise CheckpointError(f"unknown projector type {kind!r}; known are linear, mlp<N>x_gelu and identity")
    depth = int(match.group(1)) if match else 1
    layers: list[nn.Module] = [nn.Linear(in_features, out_features, bias=bias)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features, bias=bias)]
    return layers
