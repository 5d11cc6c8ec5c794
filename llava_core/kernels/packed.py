"""Linear layers with their weights in the order in which the processor's matrix kernels read them.

For inference on a CPU in bfloat16: the kernels would otherwise reorder the weights on every call, which with few rows
costs as much as the product. Packed weights cannot be trained, saved or moved. Knows nothing about models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PRODUCT = torch.ops.mkldnn._linear_pointwise.default


class PackedLinear(nn.Module):
    """Computes the same as `linear`, and takes over its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        out: Tensor = _PRODUCT(rows, self._packed, self.bias, "none", [], "")
        return out


def pack_linears(module: nn.Module) -> int:
    """Pack every plain linear layer inside `module` that this processor has kernels for; returns how many."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    parents = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        # By exact type: quantised layers are subclasses of nn.Linear.
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu"
    ]
    num_packed = len(parents)
    while parents:
        # Each plain layer is freed once its packed one exists, so no more than one is in memory twice.
        parent, name, child = parents.pop()
        setattr(parent, name, PackedLinear(child))
    return num_packed
