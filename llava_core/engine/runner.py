"""Executes a schedule with tensors: embeddings, the paged cache, the decoder, and logits where they are wanted.

Knows nothing about who is admitted, how a token is chosen, or how attention is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_core.engine.attention import NAME, Backend, CacheShape, PagedCache, RecordingBackend, Span
from llava_core.engine.attention_cpu import CpuBackend
from llava_core.engine.attention_cuda import CudaBackend
from llava_core.engine.config import EngineConfig
from llava_core.engine.graphs import DecodeGraphs, DecodeRow, unpack_sheet
from llava_core.engine.request import RequestState
from llava_core.engine.scheduler import Chunk
from llava_core.errors import EngineError
from llava_core.memory import available_bytes
from llava_core.models.fused import FusedDecoder
from llava_core.models.language import LanguageSide
from llava_core.models.splice import splice
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import ImageFeatures

# The cache's share of the memory that is free once the model is loaded, by device. A GPU is the engine's alone, but
# activations need some of it.
_MEMORY_SHARE = {"cpu": 0.4, "cuda": 0.85}
# RoPE frequencies that depend on the longest sequence in a batch would let one request change another's answer.
_VARYING_ROPE = ("dynamic", "longrope")


class ModelRunner:
    """One model with its cache. The model uses paged attention while a step runs, and its own between steps."""

    def __init__(
        self, model: LanguageSide, backend: Backend, num_blocks: int, block_size: int, *, max_recorded: int = 0
    ) -> None:
        """Pure decode steps of up to `max_recorded` answers are recorded where backend and model support it."""
        self.model = model
        self._backend = backend
        # Looked up once: transformers searches for each on every access, which takes longer than embedding a token.
        self._device, self._embeddings = model.device, model.decoder.get_input_embeddings()
        self._head = model.decoder.get_output_embeddings()
        self._is_fused = isinstance(model.decoder.model, FusedDecoder)
        config = model.decoder.config
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        if rope in _VARYING_ROPE:
            raise EngineError(f"rope_type {rope!r} depends on the longest text in a batch and is not supported")
        # Quantised layers and adapters may synchronise with the device within a step, which cannot be recorded.
        records = max_recorded > 0 and self._is_fused
        recording = backend if records and isinstance(backend, RecordingBackend) else None
        shape = cache_shape(model, num_blocks + (recording is not None), block_size)
        dtype = backend.cache_dtype(model.decoder.dtype)
        self.cache = PagedCache(shape, dtype, self._device, heads_first=backend.heads_first)
        self._graphs = None if recording is None else self._record(recording, max_recorded, spare_block=num_blocks)

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run the chunks' tokens through the model, cache their keys and values, and return logits (rows, vocab) of
        the positions that `wanted` names, chunk by chunk. They are valid until the next call."""
        if self._graphs is not None and all(_is_decode(chunk) for chunk in chunks):
            return self._graphs.run([_decode_row(chunk, self.cache.shape.block_size) for chunk in chunks])
        spans = [Span(chunk.length, chunk.stop, chunk.state.blocks) for chunk in chunks]
        positions = [place for chunk in chunks for place in range(chunk.start, chunk.stop)]
        decoder = self.model.decoder
        # A fused decoder has only paged attention.
        with nullcontext() if self._is_fused else _paged_attention(decoder):
            hidden = decoder.model(
                inputs_embeds=self._embed(chunks),
                position_ids=torch.tensor([positions], device=self._device),
                use_cache=False,
                paged=self._backend.batch(self.cache, spans),
            ).last_hidden_state[0]
        rows, first = [], 0
        for chunk in chunks:
            rows += [first + place - chunk.start for place in wanted(chunk)]
            first += chunk.length
        # In a pure decode step, all positions are wanted.
        last = hidden if len(rows) == len(positions) else hidden[rows]
        logits: Tensor = self._head(last)
        return logits

    def _record(self, backend: RecordingBackend, max_rows: int, *, spare_block: int) -> DecodeGraphs:
        decoder = self.model.decoder

        def decode(sheet: Tensor) -> Tensor:
            tokens, positions, table = unpack_sheet(sheet)
            hidden = decoder.model(
                inputs_embeds=self._embeddings(tokens)[None],
                position_ids=positions[None],
                use_cache=False,
                paged=backend.decode_batch(self.cache, positions, table),
            ).last_hidden_state[0]
            logits: Tensor = self._head(hidden)
            return logits

        return DecodeGraphs(
            decode,
            backend.record,
            max_rows=max_rows,
            max_blocks=-(-self.model.config.context_length // self.cache.shape.block_size),
            spare_block=spare_block,
            device=self._device,
        )

    def _embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Embeddings (1, tokens, hidden), with the pictures' rows that fall into the chunks."""
        ids = [token for chunk in chunks for token in chunk.state.tokens[chunk.start : chunk.stop]]
        rows = [part for chunk in chunks for part in self._image_rows(chunk)]
        tokens = torch.tensor([ids], device=self._device)
        if not rows and IMAGE_TOKEN_ID not in ids:
            # The usual case.
            embedded: Tensor = self._embeddings(tokens)
            return embedded
        return splice(tokens, self._embeddings, torch.cat(rows) if rows else None)

    def _image_rows(self, chunk: Chunk) -> list[Tensor]:
        state, parts = chunk.state, []
        for number, image in enumerate(state.images):
            start, stop = max(image.start, chunk.start), min(image.stop, chunk.stop)
            if start < stop:
                rows = self._project(state, number)
                parts.append(rows[start - image.start : stop - image.start])
            if image.stop <= chunk.stop:
                # Not needed again, unless the request is preempted and starts over.
                state.image_rows.pop(number, None)
        return parts

    def _project(self, state: RequestState, number: int) -> Tensor:
        if number not in state.image_rows:
            image: ImageFeatures = state.request.features[number]
            state.image_rows[number] = self.model.image_rows([image.features], [image.size])
        return state.image_rows[number]


@contextmanager
def _paged_attention(decoder: PreTrainedModel) -> Iterator[None]:
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def _is_decode(chunk: Chunk) -> bool:
    """Whether a chunk is a single text token whose logits are wanted."""
    state = chunk.state
    return chunk.length == 1 and chunk.is_last and state.request.score_from is None and state.tokens[-1] >= 0


def _decode_row(chunk: Chunk, block_size: int) -> DecodeRow:
    state = chunk.state
    return DecodeRow(state.tokens[-1], chunk.start, state.blocks[: -(-chunk.stop // block_size)])


def wanted(chunk: Chunk) -> range:
    """The positions of a chunk whose logits are wanted: the last token, or those just before tokens to be scored."""
    scored = chunk.state.request.score_from
    if scored is not None:
        return range(max(chunk.start, scored - 1), min(chunk.stop, chunk.state.num_prompt - 1))
    return range(chunk.stop - 1, chunk.stop) if chunk.is_last else range(0)


def cache_shape(model: LanguageSide, num_blocks: int, block_size: int) -> CacheShape:
    """The cache that this model's layers need."""
    config = model.decoder.config
    return CacheShape(config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim)


def choose_backend(model: LanguageSide) -> Backend:
    """The fastest way to compute attention where the model is."""
    return CpuBackend() if model.device.type == "cpu" else CudaBackend()


def cache_tokens(model: LanguageSide, config: EngineConfig, backend: Backend) -> int:
    """Size of the cache in tokens: as configured, else as many as all running requests could fill, within a share of
    the free memory."""
    if config.cache_tokens is not None:
        return config.cache_tokens
    shape = cache_shape(model, 1, 1)
    itemsize = backend.cache_dtype(model.decoder.dtype).itemsize
    per_token = 2 * shape.num_layers * shape.num_heads * shape.head_dim * itemsize
    fitting = int(_MEMORY_SHARE[model.device.type] * available_bytes(str(model.device))) // per_token
    return max(1, min(config.max_running * model.config.context_length, fitting))
