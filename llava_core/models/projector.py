"""Projectors: tower features to decoder embeddings. Knows nothing about towers, decoders or files."""

from torch import Tensor, nn

from llava_core.config import projector_depth
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
    layers: list[nn.Module] = [nn.Linear(in_features, out_features, bias=bias)]
    for _ in range(projector_depth(kind) - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features, bias=bias)]
    return layers
