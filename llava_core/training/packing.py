"""Packs many questions about one picture into one sequence, each blind to the others: the shared prompt runs only once.

A block of tokens sees the shared prefix and itself, at the positions it would have alone, so the loss equals that of
as many separate sequences. Pure Python on ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from llava_core.prompts.tokenize import IGNORE_LABEL, TokenizedPrompt


@dataclass(frozen=True)
class Packed:
    """All four have one entry per token. `blocks` is 0 for tokens that all others see, else the question's number."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    positions: tuple[int, ...]
    blocks: tuple[int, ...]


def pack_alone(prompt: TokenizedPrompt) -> Packed:
    """One conversation unchanged: every token sees all tokens before it."""
    length = len(prompt.ids)
    return Packed(prompt.ids, prompt.labels, tuple(range(length)), (0,) * length)


def pack_shared_prefix(prompts: Sequence[TokenizedPrompt], *, max_length: int) -> Packed:
    """Pack prompts that begin alike, keeping their longest common prefix once.

    Prompts that no longer fit `max_length` are left out, so there may be fewer blocks than prompts.
    """
    prefix = common_prefix_length(prompts)
    ids, labels = list(prompts[0].ids[:prefix]), list(prompts[0].labels[:prefix])
    positions, blocks = list(range(prefix)), [0] * prefix
    for number, prompt in enumerate(prompts, start=1):
        length = len(prompt.ids) - prefix
        if len(ids) + length > max_length:
            continue
        ids += prompt.ids[prefix:]
        # A block's first token follows another block's last one, so nothing can be learned about it.
        labels += [IGNORE_LABEL, *prompt.labels[prefix + 1 :]]
        positions += range(prefix, prefix + length)
        blocks += [number] * length
    return Packed(tuple(ids), tuple(labels), tuple(positions), tuple(blocks))


def common_prefix_length(prompts: Sequence[TokenizedPrompt]) -> int:
    """Length of the prompts' common prefix, ending at least one token before any supervised token."""
    columns = zip(*(prompt.ids for prompt in prompts), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return min(shared, *(_first_supervised(prompt) - 1 for prompt in prompts))


def _first_supervised(prompt: TokenizedPrompt) -> int:
    return next((i for i, label in enumerate(prompt.labels) if label != IGNORE_LABEL), len(prompt.labels))
