"""Collates examples into one padded batch. Knows tensors and lengths, nothing about prompts or models."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from llava_core.prompts.tokenize import IGNORE_LABEL
from llava_core.training.packing import Packed


class Example(TypedDict):
    """`images` belong to the placeholders in `tokens`, in order: a frozen tower's features (num_images, image_tokens,
    vision_hidden), or uint8 tiles (num_images, size, size, 3) where the tower is trained too."""

    tokens: Packed
    images: Tensor


class Batch(TypedDict):
    """`ids`, `labels`, `positions`: int64 (batch, length). `mask`: bool (batch, 1, length, length), true where a token
    sees another. `images`: the examples' one after another."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    mask: Tensor
    images: Tensor


def collate(examples: Sequence[Example], *, multiple_of: int = 1) -> Batch:
    """Pad on the right, to a multiple of `multiple_of` (a compiled model needs few different lengths); padding sees
    only itself and is not seen by other tokens."""
    longest = max(len(example["tokens"].ids) for example in examples)
    length = -(-longest // multiple_of) * multiple_of
    shape = (len(examples), length)
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, blocks = torch.full(shape, IGNORE_LABEL), torch.full(shape, -1)
    for row, example in enumerate(examples):
        tokens = example["tokens"]
        used = len(tokens.ids)
        ids[row, :used] = torch.tensor(tokens.ids)
        labels[row, :used] = torch.tensor(tokens.labels)
        positions[row, :used] = torch.tensor(tokens.positions)
        blocks[row, :used] = torch.tensor(tokens.blocks)
    images = torch.cat([example["images"] for example in examples])
    return {"ids": ids, "labels": labels, "positions": positions, "mask": visibility(blocks), "images": images}


def visibility(blocks: Tensor) -> Tensor:
    """bool (batch, 1, length, length) from block numbers (batch, length): causal, within a block or onto block 0."""
    length = blocks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = blocks[:, :, None] == blocks[:, None, :]
    shared = (blocks == 0)[:, None, :] & (blocks >= 0)[:, :, None]
    return ((same | shared) & causal)[:, None]
