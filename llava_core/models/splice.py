"""Splices images into the sequence: embeddings for text, projected features for placeholders, counts asserted.

Pure functions on tensors. Knows nothing about prompts, towers or decoders.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llava_core.prompts.tokenize import IMAGE_TOKEN_ID


def splice(ids: Tensor, embed: Callable[[Tensor], Tensor], image_rows: Tensor | None) -> Tensor:
    """Embeddings (*ids.shape, hidden) of `ids` (any shape, int64).

    `image_rows` (num_placeholders, hidden) fill the positions of IMAGE_TOKEN_ID in row-major order; the sentinel is
    never looked up. Raises ValueError with both counts when they differ.
    """
    is_image = ids == IMAGE_TOKEN_ID
    num_placeholders = int(is_image.sum())
    num_rows = 0 if image_rows is None else image_rows.shape[0]
    if num_placeholders != num_rows:
        raise ValueError(f"the prompt has {num_placeholders} image placeholders but {num_rows} feature rows came")
    if image_rows is None:
        return embed(ids)
    text = embed(ids[~is_image])
    out = torch.empty((*ids.shape, text.shape[-1]), dtype=text.dtype, device=text.device)
    out[~is_image] = text
    out[is_image] = image_rows.to(text.dtype)
    return out
