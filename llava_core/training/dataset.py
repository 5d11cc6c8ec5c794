"""Turns LLaVA-JSON conversations into training examples: ids, and labels from the answers' spans.

A sample from which nothing can be learned raises an error; nothing is masked out silently. Knows nothing about models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_core.errors import LlavaError
from llava_core.prompts.conversation import IMAGE_PLACEHOLDER, Rendered, Turn, render
from llava_core.prompts.templates import Style, Template
from llava_core.prompts.tokenize import IGNORE_LABEL, TokenizedPrompt, Tokenizer, tokenize_prompt
from llava_core.types import Role

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class DatasetError(LlavaError):
    """A training file or sample that cannot be used; the message names the sample and the fix."""


@dataclass(frozen=True)
class Sample:
    """One conversation of a LLaVA JSON file. `image` is a path relative to the image folder, or None."""

    id: str
    image: str | None
    turns: tuple[Turn, ...]


def load_samples(path: Path) -> list[Sample]:
    """Load every conversation of a LLaVA JSON list. Raises DatasetError naming the first malformed sample."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise DatasetError(f"{path} must hold a JSON list of conversations, not {type(rows).__name__}")
    return [parse_sample(row, index) for index, row in enumerate(rows)]


def parse_sample(row: Any, index: int) -> Sample:
    """Parse one entry of the list; a first message that is not the human's is dropped, as in the reference. Raises
    DatasetError naming the entry and what is wrong with it."""
    if not isinstance(row, Mapping):
        raise DatasetError(f"sample {index} must be an object, not {type(row).__name__}")
    name, image = str(row.get("id", index)), row.get("image") or None
    if not (image is None or isinstance(image, str)):
        raise DatasetError(f"sample {name}: image must be one path, not {image!r}")
    turns = _read_turns(row, f"sample {name}")
    num_images = sum((turn.text or "").count(IMAGE_PLACEHOLDER) for turn in turns)
    if num_images != (image is not None):
        raise DatasetError(f"sample {name}: {num_images} {IMAGE_PLACEHOLDER} for image {image!r}")
    return Sample(name, image, turns)


def _read_turns(row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    try:
        messages = [(_ROLES[message["from"]], message["value"]) for message in row["conversations"]]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{where}: conversations need `from` (human or gpt) and `value`: {error!r}") from error
    if messages and messages[0][0] == "assistant":
        messages = messages[1:]
    if len(messages) < 2:
        raise DatasetError(f"{where}: there is no message of the human's with an answer")
    for position, (role, text) in enumerate(messages):
        if role != ("assistant" if position % 2 else "user"):
            raise DatasetError(f"{where}: message {position} breaks the alternation of human and gpt")
        if not isinstance(text, str):
            raise DatasetError(f"{where}: the value of message {position} must be a text, not {text!r}")
        if role == "assistant" and IMAGE_PLACEHOLDER in text:
            raise DatasetError(f"{where}: message {position} has {IMAGE_PLACEHOLDER} in an answer")
    return tuple(Turn(role, _image_first(text)) for role, text in messages)


def _image_first(text: str) -> str:
    """Move an image to the front of its message, as the reference does, wherever the file has it."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def build_example(
    turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, image_tokens: Sequence[int], *, max_length: int
) -> TokenizedPrompt:
    """Ids and labels of a conversation. Raises DatasetError for one with nothing to learn or above `max_length`."""
    rendered = _render_plain(turns) if template.style is Style.PLAIN else render(template, turns)
    example = tokenize_prompt(rendered, tokenizer, image_tokens)
    if len(example.ids) > max_length:
        raise DatasetError(f"the conversation has {len(example.ids)} tokens, more than the limit of {max_length}")
    if all(label == IGNORE_LABEL for label in example.labels):
        raise DatasetError("the conversation has no assistant text to learn from")
    return example


def _render_plain(turns: Sequence[Turn]) -> Rendered:
    """Render for alignment as in the reference: the image, its caption, a newline; the human's words are dropped."""
    if len(turns) != 2 or turns[1].text is None or not turns[0].text or IMAGE_PLACEHOLDER not in turns[0].text:
        raise DatasetError(f"the plain template needs one message with {IMAGE_PLACEHOLDER} and one caption")
    text = f"{IMAGE_PLACEHOLDER}{turns[1].text}\n"
    return Rendered(text, ((len(IMAGE_PLACEHOLDER), len(text)),))
