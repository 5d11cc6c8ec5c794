"""BioViL-T's temporal pooler: the patches of a picture and its prior in, what changed out (arXiv 2301.04558).

A small pre-norm transformer over the patches of both. Embeddings of a patch's position and of its picture are added to
the normalised input of every attention, for values as well as for queries and keys. Knows nothing about convolutions.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-6
_DROPOUT, _DROP_PATH = 0.1, 0.25


class TemporalPooler(nn.Module):
    """Compares two feature maps of `grid` x `grid` patches, each patch `width` wide."""

    position: Tensor

    def __init__(self, width: int, grid: int, *, num_heads: int, num_blocks: int) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList(PoolerBlock(width, num_heads) for _ in range(num_blocks))
        self.norm_post = nn.LayerNorm(width, eps=_EPS)
        # Row 0 marks the patches of the picture itself, row 1 those of its prior.
        self.type_embed = nn.Parameter(torch.zeros(2, 1, width))
        self.register_buffer("position", sine_position_embedding(grid, width), persistent=False)

    def forward(self, current: Tensor, prior: Tensor) -> Tensor:
        """Two maps (N, width, grid, grid) → the difference features (N, width, grid, grid) of the current one."""
        expected = (self.grid, self.grid)
        assert current.shape[2:] == prior.shape[2:] == expected, f"{current.shape} and {prior.shape}, not {expected}"
        tokens = torch.cat([current.flatten(2), prior.flatten(2)], 2).transpose(1, 2)
        where = torch.cat([self.position + self.type_embed[0], self.position + self.type_embed[1]])
        for block in self.blocks:
            tokens = block(tokens, where)
        own: Tensor = self.norm_post(tokens)[:, : self.grid**2]
        return own.transpose(1, 2).reshape(current.shape)


class PoolerBlock(nn.Module):
    """Attention, then a multi-layer perceptron, each on a normalised copy and added to the stream."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tensor, where: Tensor) -> Tensor:
        """(N, L, width) with an embedding (L, width) → (N, L, width)."""
        tokens = tokens + drop_path(self.attn(self.norm1(tokens) + where), training=self.training)
        return tokens + drop_path(self.mlp(self.norm2(tokens)), training=self.training)


class Attention(nn.Module):
    """Multi-head self-attention whose queries, keys and values have no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.proj_q = nn.Linear(width, width, bias=False)
        self.proj_k = nn.Linear(width, width, bias=False)
        self.proj_v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, width) → (N, L, width)."""
        query, key, value = (
            projection(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.proj_q, self.proj_k, self.proj_v)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=_DROPOUT if self.training else 0.0)
        return functional.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), _DROPOUT, self.training)


class Mlp(nn.Module):
    """Two linear layers of equal width with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, width) → (N, L, width)."""
        hidden = functional.dropout(functional.gelu(self.fc1(tokens)), _DROPOUT, self.training)
        return functional.dropout(self.fc2(hidden), _DROPOUT, self.training)


def drop_path(branch: Tensor, *, training: bool) -> Tensor:
    """While training, a quarter of the batch loses this branch and the rest is scaled up (stochastic depth)."""
    if not training:
        return branch
    kept = torch.rand(len(branch), 1, 1, device=branch.device) >= _DROP_PATH
    return branch * kept.to(branch.dtype) / (1 - _DROP_PATH)


def sine_position_embedding(grid: int, width: int, *, temperature: float = 10_000.0) -> Tensor:
    """float32 (grid², width), row by row: the first half of the features encodes the row, the second the column.

    Rows and columns are counted from 1 and scaled so that the last one is 2π; sine and cosine of equal frequency are
    adjacent, as in DETR (arXiv 2005.12872).
    """
    half = width // 2
    place = torch.arange(1, grid + 1, dtype=torch.float32) / (grid + 1e-6) * (2 * math.pi)
    exponents = 2 * torch.div(torch.arange(half, dtype=torch.float32), 2, rounding_mode="floor") / half
    angles = place[:, None] / temperature**exponents
    waves = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)
    rows, columns = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)
