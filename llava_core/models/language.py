"""The language side as one module: projector and decoder, from ids and tower features to logits or a loss.

The decoder is the transformers Llama or Mistral module. Knows nothing about towers, tokenizers or scheduling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from llava_core.config import ModelConfig
from llava_core.images.geometry import merge_order
from llava_core.models.features import merge_tiles
from llava_core.models.projector import Projector
from llava_core.models.splice import splice
from llava_core.types import ImageFeatures, Size


class LanguageSide(nn.Module):
    """Projector and decoder of one LLaVA; `image_newline` (hidden,) ends the lines of a picture made of tiles."""

    def __init__(self, config: ModelConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(
            config.projector_type, config.vision.hidden_size, config.hidden_size, bias=config.projector_bias
        )
        newline = torch.randn(config.hidden_size) / config.hidden_size**0.5 if config.has_newline else None
        self.image_newline = None if newline is None else nn.Parameter(newline)
        text = AutoConfig.for_model(**{**config.text, "tie_word_embeddings": config.tie_word_embeddings})
        self.decoder: PreTrainedModel = AutoModelForCausalLM.from_config(text, attn_implementation=attention)

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return self.decoder.device

    def embed(self, ids: Tensor, features: Sequence[Tensor], sizes: Sequence[Size | None] | None = None) -> Tensor:
        """Embeddings (*ids.shape, hidden); each of `features` is (rows of all its tiles, vision_hidden), in order.

        `sizes` are those of the pictures, as ImageFeatures has them; a checkpoint that merges tiles needs them.
        """
        rows = self.image_rows(features, sizes) if features else None
        return splice(ids, self.decoder.get_input_embeddings(), rows)

    def image_rows(self, features: Sequence[Tensor], sizes: Sequence[Size | None] | None = None) -> Tensor:
        """The pictures' embeddings in a prompt, (image tokens of all pictures, hidden), from the tower's features;
        arguments as in `embed`."""
        rows: Tensor = self.projector(torch.cat([image.to(self.device, self.decoder.dtype) for image in features]))
        if self.config.pinpoints and self.config.merge_type != "flat":
            rows = self._merge(rows, [len(image) for image in features], sizes)
        return rows

    def num_image_rows(self, image: ImageFeatures) -> int:
        """Number of rows that `image_rows` returns for a picture. Raises ValueError when it has too few features."""
        is_one_tile = len(image.features) == self.config.vision.tokens_per_tile
        if image.size is None and not is_one_tile and self.config.pinpoints and self.config.merge_type != "flat":
            raise ValueError("this model merges tiles, which requires the picture's size")
        order = merge_order(self.config, image.size)
        if order is None:
            return len(image.features)
        if max(order) >= len(image.features):
            raise ValueError(
                f"a picture of {image.size} needs {max(order) + 1} feature rows, not {len(image.features)}"
            )
        return len(order)

    def _merge(self, rows: Tensor, counts: Sequence[int], sizes: Sequence[Size | None] | None) -> Tensor:
        if sizes is None or len(sizes) != len(counts):
            raise ValueError(f"{len(counts)} pictures came with {0 if sizes is None else len(sizes)} sizes")
        merged = [
            merge_tiles(image, merge_order(self.config, size), self.image_newline)
            for image, size in zip(rows.split(list(counts)), sizes, strict=True)
        ]
        return torch.cat(merged)

    def forward(
        self,
        ids: Tensor,
        features: Sequence[Tensor],
        cache: Cache | None = None,
        *,
        sizes: Sequence[Size | None] | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (batch, length, vocab) of `ids` (batch, length); `cache` is extended in place when given.

        `mask` is a padding mask (batch, length) or an attention mask (batch, 1, length, length); `positions`
        (batch, length) default to 0, 1, 2, ... With `last_only` the length of the result is 1: the position that the
        next token is sampled from. `sizes` as in `embed`.
        """
        out = self.decoder(
            inputs_embeds=self.embed(ids, features, sizes),
            attention_mask=None if mask is None else self._additive(mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if last_only else 0,
        )
        logits: Tensor = out.logits
        return logits

    def _additive(self, mask: Tensor) -> Tensor:
        """The attention mask as numbers to add to scores. Eager attention, given booleans, would add 0 and 1."""
        if mask.ndim == 2:
            return mask
        hidden = torch.finfo(self.decoder.dtype).min
        return torch.zeros(mask.shape, dtype=self.decoder.dtype, device=mask.device).masked_fill(~mask, hidden)
