"""The decoder's linear layers in 8 or 4 bits, by bitsandbytes, on CPU and CUDA.

8 bits: LLM.int8() (Dettmers et al., 2022). 4 bits: NF4 in blocks of 64 (Dettmers et al., "QLoRA", 2023). Embeddings,
norms and the output head keep their dtype, as in transformers. Knows nothing about towers, projectors or files.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_core.errors import CheckpointError
from llava_core.types import Quantization

_NF4_BLOCK = 64


def check_quantization(kind: Quantization | None) -> None:
    """Raise CheckpointError, before anything is loaded, where `kind` is not available."""
    if kind not in (None, "8bit", "4bit"):
        raise CheckpointError(f"quantization {kind!r} is unknown; known are 8bit and 4bit")
    if kind is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(
            f"quantization {kind} needs bitsandbytes, which is not installed: pip install 'llava-serve[quantization]'"
        )


def check_layers(decoder: PreTrainedModel, kind: Quantization, *, device: str) -> None:
    """Raise CheckpointError, naming the layer, where `kind` would compute wrong results; needs no weights."""
    if kind == "4bit" and device == "cpu":
        # There, bitsandbytes up to 0.50 silently uses the scales of other blocks.
        for name, layer in _layers(decoder):
            if layer.in_features % _NF4_BLOCK:
                raise CheckpointError(
                    f"4bit on the CPU needs layers of a multiple of {_NF4_BLOCK} inputs, and {name} has "
                    f"{layer.in_features}; use 8bit, or a GPU"
                )


def quantize(decoder: PreTrainedModel, kind: Quantization, *, device: str, dtype: torch.dtype) -> None:
    """Replace linear layers in place, one after the other, by layers on `device` that compute in `dtype`.

    The weights are quantised from their own dtype, whatever `dtype` is. In 8 bits a layer's input is rounded to
    float16, as LLM.int8() requires.
    """
    # bitsandbytes would log that rounding on every call of every layer, and on a CPU recommend a kernel from the hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    build = _build_8bit if kind == "8bit" else _build_4bit
    layers = _layers(decoder)
    while layers:
        # Popped, so that its weights are freed before the next layer is built.
        name, layer = layers.pop()
        decoder.set_submodule(name, build(layer, dtype).to(device))


def _layers(decoder: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    head = decoder.get_output_embeddings()
    modules = decoder.named_modules()
    return [(name, layer) for name, layer in modules if isinstance(layer, nn.Linear) and layer is not head]


def _build_8bit(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    built: nn.Module = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, device="meta"
    )
    built.weight = bnb.nn.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    return _with_bias(built, layer, dtype)


def _build_4bit(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    bnb: Any = importlib.import_module("bitsandbytes")
    built: nn.Module = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    built.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
    return _with_bias(built, layer, dtype)


def _with_bias(built: nn.Module, layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    built.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return built
