"""The language side as one module: projector and decoder, from ids and tower features to logits or a loss.

The decoder is the transformers Llama or Mistral module. Knows nothing about towers, tokenizers or scheduling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from llava_core.config import ModelConfig
from llava_core.models.projector import Projector
from llava_core.models.splice import splice


class LanguageSide(nn.Module):
    """Projector and decoder of one LLaVA."""

    def __init__(self, config: ModelConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(
            config.projector_type, config.vision.hidden_size, config.hidden_size, bias=config.projector_bias
        )
        text = AutoConfig.for_model(**{**config.text, "tie_word_embeddings": config.tie_word_embeddings})
        self.decoder: PreTrainedModel = AutoModelForCausalLM.from_config(text, attn_implementation=attention)

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return self.decoder.device

    def embed(self, ids: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Embeddings (*ids.shape, hidden); each of `features` is (num_image_tokens, vision_hidden), in order."""
        rows = None
        if features:
            rows = self.projector(torch.cat([image.to(self.device, self.decoder.dtype) for image in features]))
        return splice(ids, self.decoder.get_input_embeddings(), rows)

    def forward(
        self,
        ids: Tensor,
        features: Sequence[Tensor],
        cache: Cache | None = None,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (batch, length, vocab) of `ids` (batch, length); `cache` is extended in place when given.

        `mask` is a padding mask (batch, length) or says who sees whom (batch, 1, length, length); `positions`
        (batch, length) default to 0, 1, 2, ... With `last_only` the length of the result is 1: the position that the
        next token is drawn from.
        """
        out = self.decoder(
            inputs_embeds=self.embed(ids, features),
            attention_mask=None if mask is None else self._additive(mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1 if last_only else 0,
        )
        logits: Tensor = out.logits
        return logits

    def _additive(self, mask: Tensor) -> Tensor:
        """Who sees whom as numbers to add to scores. Not every attention takes booleans: eager would add 0 and 1."""
        if mask.ndim == 2:
            return mask
        hidden = torch.finfo(self.decoder.dtype).min
        return torch.zeros(mask.shape, dtype=self.decoder.dtype, device=mask.device).masked_fill(~mask, hidden)
