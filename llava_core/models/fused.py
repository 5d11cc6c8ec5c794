"""Llama and Mistral decoders for inference over a paged cache, in fewer, larger operations than transformers' modules.

A step that decodes a few tokens spends more time launching operations than running them. Here queries, keys and values
are one product, both halves of the gate another, and the weights are laid out as the processor reads them. Afterwards a
decoder cannot be trained or saved. Knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel

from llava_core.kernels.native import native_kernels
from llava_core.kernels.packed import pack_linears
from llava_core.models.language import LanguageSide

# Up to this many tokens, the number of operations dominates, not the work in each.
_FEW = 32
_SILU = (nn.SiLU, SiLUActivation)


class Kernels(Protocol):
    """Our own kernels for the operations of a layer other than its matrix products. For arguments see
    kernels/native.py."""

    def add_norm_(self, hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """The norm of a sum, which is computed in place."""
        ...

    def rotate_(self, projected: Tensor, num_heads: int, cos: Tensor, signed_sin: Tensor, positions: Tensor) -> None:
        """Rotate heads by their rows' positions in the text."""
        ...

    def gate(self, both: Tensor) -> Tensor:
        """SiLU of one half, times the other."""
        ...


class Batch(Protocol):
    """One step's packed tokens over a cache; built once, used by every layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store the new `key` and `value` (tokens, num_kv_heads, head_dim), and let `query` (tokens, num_heads,
        head_dim) attend to its request's tokens up to itself, the last `window` of them if given; returns (tokens,
        num_heads, head_dim)."""
        ...


def ready_language(side: LanguageSide, *, use_kernels: bool = True) -> None:
    """Fuse and pack the decoder where possible, with our own kernels where this machine can build them. A decoder whose
    linear layers are not plain, such as quantised ones, keeps its modules."""
    model: nn.Module = side.decoder.model
    if isinstance(model, LlamaModel | MistralModel) and _is_plain(model):
        kernels = _kernels(side) if use_kernels else None
        side.decoder.model = FusedDecoder(model, kernels)
    pack_linears(side)


def _kernels(side: LanguageSide) -> Kernels | None:
    if side.device.type == "cuda":
        # Triton is installed wherever CUDA is.
        from llava_core.kernels.layer_gpu import GpuKernels

        return GpuKernels()
    return native_kernels(side.decoder.dtype, side.device.type)


def _is_plain(model: nn.Module) -> bool:
    # By exact type: quantised layers and adapters are subclasses of nn.Linear.
    return all(type(child) is nn.Linear for child in model.modules() if isinstance(child, nn.Linear)) and not any(
        hasattr(child, "base_layer") for child in model.modules()
    )


class FusedDecoder(nn.Module):
    """Replaces a transformers model without its head, and takes over its weights."""

    cos: Tensor
    signed_sin: Tensor

    def __init__(self, model: LlamaModel | MistralModel, kernels: Kernels | None) -> None:
        super().__init__()
        self.embed_tokens, self.norm = model.embed_tokens, Norm(model.norm, kernels)
        cos, signed_sin = _rotations(model)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("signed_sin", signed_sin, persistent=False)
        window = model.config.sliding_window if isinstance(model, MistralModel) else None
        self.layers = nn.ModuleList()
        for index in range(len(model.layers)):
            self.layers.append(FusedLayer(model.layers[index], index, window, kernels))
            # Each layer's original weights are freed once fused, so no more than one layer is in memory twice.
            model.layers[index] = nn.Identity()

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, paged: Batch, **_: object) -> BaseModelOutput:
        """Hidden states (1, tokens, hidden) from `inputs_embeds` (1, tokens, hidden), `position_ids` (1, tokens)."""
        rotation = Rotation(self.cos, self.signed_sin, position_ids[0])
        # Cloned, because sums are computed in place.
        hidden, added = inputs_embeds[0].clone(), None
        for layer in self.layers:
            hidden, added = layer(hidden, added, rotation, paged)
        return BaseModelOutput(self.norm(hidden, added)[1][None])


def _rotations(model: LlamaModel | MistralModel) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, (positions, 1, head_dim), which transformers recomputes in each step. The
    first half of the sine is negated, in place of the half of the heads' values that it is multiplied with."""
    weight = model.embed_tokens.weight
    positions = torch.arange(model.config.max_position_embeddings, device=weight.device)[None]
    cos, sin = model.rotary_emb(weight[:0], positions)
    half = sin.shape[-1] // 2
    return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None]


class Rotation:
    """The rotary embedding of one step's tokens; `positions` (tokens,) are rows of the tables."""

    def __init__(self, cos: Tensor, signed_sin: Tensor, positions: Tensor) -> None:
        self._cos, self._signed_sin, self._positions = cos, signed_sin, positions
        self._of_step: tuple[Tensor, Tensor] | None = None

    def turn(self, projected: Tensor, num_heads: int, kernels: Kernels | None) -> Tensor:
        """The first `num_heads` heads of `projected` (tokens, heads, head_dim), rotated; may overwrite `projected`."""
        if kernels is not None:
            kernels.rotate_(projected, num_heads, self._cos, self._signed_sin, self._positions)
            return projected[:, :num_heads]
        if self._of_step is None:
            cos, sin = (table.index_select(0, self._positions) for table in (self._cos, self._signed_sin))
            self._of_step = cos, sin
        cos, sin = self._of_step
        straight = projected[:, :num_heads]
        return torch.addcmul(straight * cos, straight.roll(straight.shape[-1] // 2, -1), sin)


class FusedLayer(nn.Module):
    """One decoder layer with four products instead of seven."""

    def __init__(self, layer: nn.Module, index: int, window: int | None, kernels: Kernels | None) -> None:
        super().__init__()
        assert isinstance(layer, LlamaDecoderLayer | MistralDecoderLayer), type(layer)
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.window = index, window
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.input_norm = Norm(layer.input_layernorm, kernels)
        self.mlp_norm = Norm(layer.post_attention_layernorm, kernels)
        self.qkv = _join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = attention.o_proj
        self.gate_up = _join([mlp.gate_proj, mlp.up_proj])
        self.down, self.activation = mlp.down_proj, mlp.act_fn
        self._kernels = kernels
        self._gate = kernels.gate if kernels is not None and isinstance(mlp.act_fn, _SILU) else self._gate_with_torch

    def forward(self, hidden: Tensor, added: Tensor | None, rotation: Rotation, paged: Batch) -> tuple[Tensor, Tensor]:
        """Map `hidden` and the summand still to be added to it, both (tokens, hidden), to the same pair."""
        hidden, normed = self.input_norm(hidden, added)
        projected = self.qkv(normed).view(len(hidden), -1, self.head_dim)
        turned = rotation.turn(projected, self.num_heads + self.num_kv_heads, self._kernels)
        query, key = turned.split([self.num_heads, self.num_kv_heads], 1)
        seen = paged.attend(self.index, query, key, projected[:, -self.num_kv_heads :], self.scale, self.window)
        hidden, normed = self.mlp_norm(hidden, self.out(seen.flatten(1)))
        done: Tensor = self.down(self._gate(self.gate_up(normed)))
        return hidden, done

    def _gate_with_torch(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        product: Tensor = self.activation(gate) * up
        return product


class Norm(nn.Module):
    """RMS norm of a sum. On a CPU, torch needs ten small operations for that, but only one for layer norm, which first
    subtracts the mean; so it is given the numbers together with their negatives, whose mean is 0."""

    signs: Tensor
    doubled: Tensor

    def __init__(self, norm: Any, kernels: Kernels | None = None) -> None:
        super().__init__()
        self._kernels = kernels
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.shape = self.weight.shape
        weight = self.weight.detach()
        self.register_buffer("signs", weight.new_tensor([[1.0], [-1.0]]), persistent=False)
        self.register_buffer("doubled", torch.stack((weight, weight)), persistent=False)

    def forward(self, hidden: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`hidden` + `added`, both (tokens, hidden), and the norm of the sum, which may be computed in place."""
        if self._kernels is not None:
            return hidden, self._kernels.add_norm_(hidden, added, self.weight, self.eps)
        hidden = hidden if added is None else hidden + added
        if len(hidden) > _FEW or not hidden.is_cpu:
            return hidden, F.rms_norm(hidden, self.shape, self.weight, self.eps)
        both = hidden[:, None] * self.signs
        return hidden, F.layer_norm(both, (2, *self.shape), self.doubled, None, self.eps)[:, 0]


def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose output is the concatenated outputs of several."""
    first = linears[0]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(first.in_features, len(weight), bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return joined
