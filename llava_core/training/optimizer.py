"""Muon for the weight matrices inside the network, AdamW for everything else, as one optimizer.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), as in torch.optim.Muon.
Embeddings, the output head, norms and biases stay with AdamW, as its authors advise. Knows nothing about models
beyond the names and shapes of their parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel


class MuonAdamW(Optimizer):
    """Both optimizers behind one interface, so that a scheduler, gradient clipping and checkpoints see a single one.

    `muon_learning_rate` is the step of an orthogonalized update, `learning_rate` is AdamW's.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, muon_learning_rate: float, weight_decay: float
    ) -> None:
        hidden = hidden_matrices(model)
        chosen = {id(parameter) for parameter in hidden}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        self._parts: list[Optimizer] = [
            Muon(hidden, lr=muon_learning_rate, weight_decay=weight_decay),
            AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts use this object's state and groups, so that they see changes by a scheduler or a checkpoint."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Optimizer.load_state_dict; the parts continue from the loaded state."""
        super().load_state_dict(state_dict)
        self._share()


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of linear layers, except the output head, which is an embedding in reverse."""
    heads = [module.get_output_embeddings() for module in model.modules() if isinstance(module, PreTrainedModel)]
    hidden = [module for module in model.modules() if isinstance(module, nn.Linear) and module not in heads]
    weights = [module.get_parameter("weight") for module in hidden]
    return [weight for weight in weights if weight.requires_grad]
