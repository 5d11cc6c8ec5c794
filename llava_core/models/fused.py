"""Llama and Mistral decoders for inference over a paged cache, in fewer, larger operations than transformers' modules.

A step that writes a few tokens takes longer to be told what to do than to do it. Here queries, keys and values are one
product, both halves of the gate another, and the weights lie as the processor reads them. Afterwards a decoder cannot
be trained or saved. Knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel

from llava_core.kernels.packed import pack_linears
from llava_core.models.language import LanguageSide

# Up to so many tokens it is the number of operations that counts, not what each of them does.
_FEW = 32


class Batch(Protocol):
    """One step's packed tokens over a cache; made once, asked by every layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Store the new `key` and `value` (tokens, num_kv_heads, head_dim), and let `query` (tokens, num_heads,
        head_dim) see its request's tokens up to itself, the last `window` of them if given; returns (tokens, num_heads,
        head_dim)."""
        ...


def ready_language(side: LanguageSide) -> None:
    """Fuse and pack what can be. A decoder with other than plain linear layers, quantised ones for instance, keeps its
    modules."""
    model: nn.Module = side.decoder.model
    if isinstance(model, LlamaModel | MistralModel) and _is_plain(model):
        side.decoder.model = FusedDecoder(model)
    pack_linears(side)


def _is_plain(model: nn.Module) -> bool:
    # Exactly: quantised layers and adapters are linear ones too.
    return all(type(child) is nn.Linear for child in model.modules() if isinstance(child, nn.Linear)) and not any(
        hasattr(child, "base_layer") for child in model.modules()
    )


class FusedDecoder(nn.Module):
    """Takes the place, and the weights, of a transformers model without its head."""

    cos: Tensor
    signed_sin: Tensor

    def __init__(self, model: LlamaModel | MistralModel) -> None:
        super().__init__()
        self.embed_tokens, self.norm = model.embed_tokens, Norm(model.norm)
        cos, signed_sin = _rotations(model)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("signed_sin", signed_sin, persistent=False)
        window = model.config.sliding_window if isinstance(model, MistralModel) else None
        self.layers = nn.ModuleList()
        for index in range(len(model.layers)):
            self.layers.append(FusedLayer(model.layers[index], index, window))
            # Each layer's own weights go as soon as they are fused: no more than one is in memory twice.
            model.layers[index] = nn.Identity()

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, paged: Batch, **_: object) -> BaseModelOutput:
        """`inputs_embeds` (1, tokens, hidden) and `position_ids` (1, tokens) to as many hidden states."""
        positions = position_ids[0]
        rotation = self.cos.index_select(0, positions), self.signed_sin.index_select(0, positions)
        hidden = inputs_embeds[0]
        for layer in self.layers:
            hidden = layer(hidden, rotation, paged)
        return BaseModelOutput(self.norm(hidden)[None])


def _rotations(model: LlamaModel | MistralModel) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, (positions, 1, head_dim), as transformers computes them at each step; the first
    half of the sine is negative, because that of the numbers it is multiplied with would have to be."""
    weight = model.embed_tokens.weight
    positions = torch.arange(model.config.max_position_embeddings, device=weight.device)[None]
    cos, sin = model.rotary_emb(weight[:0], positions)
    half = sin.shape[-1] // 2
    return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None]


class FusedLayer(nn.Module):
    """One decoder layer with four products instead of seven."""

    def __init__(self, layer: nn.Module, index: int, window: int | None) -> None:
        super().__init__()
        assert isinstance(layer, LlamaDecoderLayer | MistralDecoderLayer), type(layer)
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.window = index, window
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.input_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.qkv = _join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = attention.o_proj
        self.gate_up = _join([mlp.gate_proj, mlp.up_proj])
        self.down, self.activation = mlp.down_proj, mlp.act_fn

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], paged: Batch) -> Tensor:
        """(tokens, hidden) to the same; `rotation` is cosine and signed sine, (tokens, 1, head_dim)."""
        cos, sin = rotation
        projected = self.qkv(self.input_norm(hidden)).view(len(hidden), -1, self.head_dim)
        turned, value = projected.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], 1)
        turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin)
        query, key = turned.split([self.num_heads, self.num_kv_heads], 1)
        seen = paged.attend(self.index, query, key, value, self.scale, self.window)
        hidden = hidden + self.out(seen.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        done: Tensor = hidden + self.down(self.activation(gate) * up)
        return done


class Norm(nn.Module):
    """Numbers divided by their root mean square. On a processor that is ten small operations, but layer norm is one: it
    takes the mean away first, and numbers together with their negatives have a mean of 0."""

    signs: Tensor
    doubled: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self.shape = self.weight.shape
        weight = self.weight.detach()
        self.register_buffer("signs", weight.new_tensor([[1.0], [-1.0]]), persistent=False)
        self.register_buffer("doubled", torch.stack((weight, weight)), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) to the same."""
        if len(hidden) > _FEW or not hidden.is_cpu:
            return F.rms_norm(hidden, self.shape, self.weight, self.eps)
        both = hidden[:, None] * self.signs
        return F.layer_norm(both, (2, *self.shape), self.doubled, None, self.eps)[:, 0]


def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that gives the results of several, one behind the other."""
    first = linears[0]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    joined = nn.Linear(first.in_features, len(weight), bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return joined
