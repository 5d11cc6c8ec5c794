"""Prompt text to token ids, image by image and piece by piece, with labels from the answers' spans.

This is the only place where `<image>` becomes placeholder ids. Pieces between images are tokenized separately, as in
the reference: the seam after an image matters to released weights. Knows no models.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llava_core.prompts.conversation import IMAGE_PLACEHOLDER, Rendered

# One sentinel per image token; never looked up in an embedding table. The value is the reference's.
IMAGE_TOKEN_ID = -200
# Splits a text into pieces that are tokenized separately. A Unicode noncharacter, for which no text has a use.
SEAM = "\ufdd0"
# Positions that training must not learn from; the value is PyTorch's default `ignore_index`.
IGNORE_LABEL = -100


@dataclass(frozen=True)
class Tokenized:
    """A prompt's token ids, the bytes of each, and how many tokens a prompt and its answer may have together."""

    ids: tuple[int, ...]
    token_bytes: tuple[bytes, ...] = field(repr=False)
    context_length: int


class Tokenizer(Protocol):
    """What prompts need from a tokenizer; `checkpoints.tokenizer` implements it for transformers' tokenizers."""

    bos_id: int | None

    def encode(self, text: str) -> Sequence[tuple[int, int, int]]:
        """(id, start, end) per token without special framing; [start, end) are characters of `text`."""
        ...


@dataclass(frozen=True)
class TokenizedPrompt:
    """`ids` with IMAGE_TOKEN_ID repeated for each image; `labels` equal the ids inside answers, else IGNORE_LABEL."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def as_text(text: str, control_texts: Collection[str]) -> str:
    """The text with a seam inside everything that would become a control token or an image, so that it stays text.

    A control token of a single character has no room for a seam and is left unchanged.
    """
    for control in sorted(control_texts, key=len, reverse=True):
        # Repeated, for occurrences that overlap.
        while len(control) > 1 and control in text:
            text = text.replace(control, control[0] + SEAM + control[1:])
    return text


def tokenize_prompt(rendered: Rendered, tokenizer: Tokenizer, image_tokens: Sequence[int]) -> TokenizedPrompt:
    """Ids and labels of a rendered prompt; `image_tokens` is the number of placeholders of each image, in order.

    Raises ValueError when the number of `<image>` in the prompt differs from the length of `image_tokens`.
    """
    pieces = rendered.text.split(IMAGE_PLACEHOLDER)
    if len(pieces) - 1 != len(image_tokens):
        raise ValueError(f"the prompt has {len(pieces) - 1} {IMAGE_PLACEHOLDER} but {len(image_tokens)} images came")
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    labels = [IGNORE_LABEL] * len(ids)
    offset = 0
    for index, piece in enumerate(pieces):
        if index:
            ids += [IMAGE_TOKEN_ID] * image_tokens[index - 1]
            labels += [IGNORE_LABEL] * image_tokens[index - 1]
            offset += len(IMAGE_PLACEHOLDER)
        for number, part in enumerate(piece.split(SEAM)):
            offset += len(SEAM) if number else 0
            tokens = tokenizer.encode(part) if part else ()
            ids += [token for token, _, _ in tokens]
            labels += _labels(tokens, [span for span in rendered.answer_spans if span[0] < offset + len(part)], offset)
            offset += len(part)
    return TokenizedPrompt(tuple(ids), tuple(labels))


def _labels(tokens: Sequence[tuple[int, int, int]], spans: Sequence[tuple[int, int]], offset: int) -> list[int]:
    """Each token that lies inside a span, else IGNORE_LABEL; `offset` is where the tokens' piece begins."""
    if not spans:
        return [IGNORE_LABEL] * len(tokens)
    return [
        token if any(first <= offset + start and offset + end <= last for first, last in spans) else IGNORE_LABEL
        for token, start, end in tokens
    ]
