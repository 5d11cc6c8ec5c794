"""A request becomes token ids and tiles: decode pictures, render the template, tokenize with placeholders, check.

Every caller's mistake is detected here, on a CPU, before a GPU is touched. Knows nothing about weights, engines or
transport, and does not import torch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llava_core.config import ModelConfig
from llava_core.errors import RequestError
from llava_core.images.biovil import AnyPreprocessConfig, BioVilPreprocessConfig, preprocess_biovil
from llava_core.images.geometry import num_image_tokens
from llava_core.images.loading import check_size, decode_image
from llava_core.images.preprocess import PreprocessConfig, preprocess
from llava_core.lru import LruCache
from llava_core.prompts.budget import token_budget
from llava_core.prompts.conversation import (
    IMAGE_END,
    IMAGE_PLACEHOLDER,
    IMAGE_START,
    Rendered,
    Turn,
    render,
    user_turns,
)
from llava_core.prompts.templates import Template, get_template
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID, SEAM, Tokenized, Tokenizer, as_text, tokenize_prompt
from llava_core.request_limits import RequestLimits, check_request
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    ImagePart,
    Message,
    PreparedImage,
    PreparedRequest,
    RenderedRequest,
    SamplingParams,
    Size,
    TextPart,
)


class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer that also maps ids back to bytes."""

    @property
    def num_tokens(self) -> int:
        """Number of token ids."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; for a control token, its name."""
        ...


@dataclass(frozen=True)
class Preparer:
    """Turns requests for one model into inputs for its tower and engine. Safe to use from several threads.

    `reserved_texts` are the texts of control tokens, which stay text where a message contains them. Prepared pictures
    are kept in `cache`: an identical file, byte for byte, is not decoded again. Several Preparers may share one cache,
    as each finds only pictures prepared exactly as it would itself.
    """

    config: ModelConfig
    template: Template
    tokenizer: TextTokenizer
    preprocess: AnyPreprocessConfig
    reserved_texts: Set[str]
    limits: RequestLimits = field(default_factory=RequestLimits)
    cache: LruCache[PreparedImage] = field(default_factory=lambda: LruCache(0), repr=False, compare=False)

    @cached_property
    def _processing(self) -> bytes:
        """A digest of all settings that decide what tiles a picture becomes and whether it is refused."""
        return hashlib.sha256(repr((self.preprocess, self.limits.image)).encode()).digest()

    def prepare(self, request: AnyRequest) -> PreparedRequest:
        """Prepare a request. Raises RequestError (ImageError, PromptTooLongError, ...) with field, cause and limit."""
        prepared = self._prepare(request)
        is_a_wish = isinstance(request, RenderedRequest)
        wanted = None if is_a_wish else request.sampling.max_tokens
        # The engine would refuse the prompt too, but only after the tower had run.
        room = token_budget(len(prepared.prompt_ids), wanted, self.config.context_length)
        return replace(prepared, sampling=self._fitted(request.sampling, room)) if is_a_wish else prepared

    def tokenize(self, request: AnyRequest) -> Tokenized:
        """The prompt's ids, however many. Raises the same errors as `prepare`, except for the prompt's length.

        Image tokens have the checkpoint's own id, where it defines one.
        """
        ids = self._prepare(request).prompt_ids
        image_id = self.config.image_token_id
        return Tokenized(
            tuple(image_id if token == IMAGE_TOKEN_ID and image_id is not None else token for token in ids),
            tuple(IMAGE_PLACEHOLDER.encode() if token == IMAGE_TOKEN_ID else self._bytes_of(token) for token in ids),
            self.config.context_length,
        )

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of these ids, with control tokens as their names. Raises RequestError for ids that do not exist."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        if not 0 <= token < self.tokenizer.num_tokens:
            raise RequestError(
                f"token {token} does not exist: the tokenizer knows 0 to {self.tokenizer.num_tokens - 1}",
                param="tokens",
            )
        return self.tokenizer.token_bytes(token)

    def _prepare(self, request: AnyRequest) -> PreparedRequest:
        self.check(request)
        if isinstance(request, CompletionRequest):
            return self._prepare_text(request)
        if isinstance(request, RenderedRequest):
            return self._prepare_rendered(request)
        if request.has_addresses:
            raise RequestError("a request is prepared from pictures, not from their addresses", param="messages")
        images = tuple(
            self._cached_image(part, f"messages[{index}].content[{position}].image_url")
            for index, message in enumerate(request.messages)
            for position, part in enumerate(message.parts)
            if isinstance(part, ImagePart)
        )
        template = self.template if request.template is None else get_template(request.template)
        messages = joined(request.messages)
        turns = [turn for index, message in enumerate(messages) for turn in self._turns(template, message, index)]
        system = None if request.system is None else self._as_text(request.system)
        rendered = render(template, [*turns, Turn("assistant", None)], system=system)
        return self._with_images(request, rendered, images)

    def _with_images(
        self, request: AnyRequest, rendered: Rendered, images: tuple[PreparedImage, ...]
    ) -> PreparedRequest:
        tokens = tuple(num_image_tokens(self.config, image.size) for image in images)
        ids = tokenize_prompt(rendered, self.tokenizer, tokens).ids
        return PreparedRequest(
            request.request_id,
            ids,
            images,
            request.sampling,
            rendered.text.replace(SEAM, ""),
            tokens,
            transforms=tuple(image.transform for image in images),
        )

    def _prepare_text(self, request: CompletionRequest) -> PreparedRequest:
        """Prepare a completion. Token ids are used unchanged and may hold control tokens, but no pictures."""
        prompt, sampling = request.prompt, request.sampling
        if not isinstance(prompt, str):
            return PreparedRequest(request.request_id, prompt, (), sampling, goes_on=True)
        text = self._as_text(prompt)
        ids = tokenize_prompt(Rendered(text, ()), self.tokenizer, ()).ids
        return PreparedRequest(request.request_id, ids, (), sampling, text.replace(SEAM, ""), goes_on=True)

    def _prepare_rendered(self, request: RenderedRequest) -> PreparedRequest:
        images = tuple(self._cached_image(part, f"images[{index}]") for index, part in enumerate(request.images))
        image = f"{IMAGE_START}{IMAGE_PLACEHOLDER}{IMAGE_END}" if self.config.image_start_end else IMAGE_PLACEHOLDER
        rendered = Rendered(request.prompt.replace(IMAGE_PLACEHOLDER, image), ())
        return self._with_images(request, rendered, images)

    def _fitted(self, sampling: SamplingParams, room: int) -> SamplingParams:
        """Limit `max_tokens` to `room`. Also turn stop strings that are control tokens into `stop_token_ids`: a control
        token has no text to match, so the answer has to end at the token itself."""
        controls = [self.tokenizer.encode(stop) for stop in sampling.stop if stop in self.reserved_texts]
        tokens = tuple(found[0][0] for found in controls if len(found) == 1)
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        return replace(sampling, max_tokens=max_tokens, stop_token_ids=(*sampling.stop_token_ids, *tokens))

    def check_size(self, size: Size) -> None:
        """Raise RequestError where a picture of this size would be refused whatever the rest of the request."""
        check_size(size, self.limits.image, "messages")
        turns = self._turns(self.template, Message("user", (ImagePart(b""),)), 0)
        rendered = render(self.template, [*turns, Turn("assistant", None)])
        ids = tokenize_prompt(rendered, self.tokenizer, (num_image_tokens(self.config, size),)).ids
        token_budget(len(ids), None, self.config.context_length)

    def _turns(self, template: Template, message: Message, index: int) -> list[Turn]:
        """A message as turns of the template; only the first message may be wrapped in an exchange of its own."""
        texts = [self._as_text(part.text) for part in message.parts if isinstance(part, TextPart)]
        if message.role == "assistant":
            return [Turn("assistant", "\n".join(texts))]
        num_images = sum(isinstance(part, ImagePart) for part in message.parts)
        template = replace(template, wraps_images=template.wraps_images and index == 0)
        return user_turns(template, texts, num_images, start_end=self.config.image_start_end)

    def check(self, request: AnyRequest) -> None:
        """Raise RequestError for anything detectable without looking at a picture."""
        check_request(request, self.limits, self.reserved_texts)

    def _as_text(self, text: str) -> str:
        return as_text(text, self.reserved_texts)

    def _cached_image(self, part: ImagePart, param: str) -> PreparedImage:
        tiling = isinstance(self.preprocess, PreprocessConfig) and self.preprocess.aspect == "anyres"
        overview_only = part.low_detail and tiling
        digest = hashlib.sha256(self._processing)
        # The same file viewed in two ways is two pictures.
        digest.update(repr((overview_only, part.dicom)).encode())
        digest.update(part.data)
        key = digest.hexdigest()
        image = self.cache.get(key)
        if image is None:
            image = self._prepare_image(part, param, overview_only=overview_only)
            self.cache.put(key, image, image.tiles.nbytes)
        return image

    def _prepare_image(self, part: ImagePart, param: str, *, overview_only: bool) -> PreparedImage:
        # BioViL-T stretches the contrast, so reducing 16 bits to 8 first would lose too much.
        keeps_depth = isinstance(self.preprocess, BioVilPreprocessConfig)
        image, transform = decode_image(
            part.data, self.limits.image, param=param, keeps_depth=keeps_depth, dicom=part.dicom
        )
        if isinstance(self.preprocess, BioVilPreprocessConfig):
            tiles = preprocess_biovil(image, self.preprocess)
        else:
            tiles = preprocess(image, self.preprocess, overview_only=overview_only)
        # Requests may share the tiles.
        tiles.flags.writeable = False
        size = None if overview_only else Size(*image.size)
        return PreparedImage(tile_digest(tiles), size, tiles, transform)


def joined(messages: Sequence[Message]) -> list[Message]:
    """Consecutive messages of one role merged into one: templates need user and assistant to alternate."""
    runs = itertools.groupby(messages, key=lambda message: message.role)
    return [Message(role, tuple(part for message in run for part in message.parts)) for role, run in runs]


def tile_digest(tiles: npt.NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels as the tower will see them, shape included: equal digests mean equal features."""
    return hashlib.sha256(repr(tiles.shape).encode() + tiles.tobytes()).hexdigest()
