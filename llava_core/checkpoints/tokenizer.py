"""A checkpoint's tokenizer behind the two small interfaces the project needs: prompts to ids, ids to text.

Fast tokenizers only, because labels need character offsets. Knows nothing about weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from llava_core.errors import CheckpointError
from llava_core.prompts.conversation import IMAGE_PLACEHOLDER, Turn, render
from llava_core.prompts.templates import TEMPLATES, Template, get_template


class CheckpointTokenizer:
    """Satisfies prompts.tokenize.Tokenizer and engine.detokenize.Decoder."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner
        self.bos_id: int | None = inner.bos_token_id
        # Not `all_special_tokens`, which leaves out those that only tokenizer.json knows.
        special = {token.content for token in inner.added_tokens_decoder.values() if token.special}
        # Text that would turn into control tokens; users' messages must not hold it.
        self.reserved_texts = frozenset(special | {IMAGE_PLACEHOLDER}) - {""}

    def encode(self, text: str) -> Sequence[tuple[int, int, int]]:
        """(id, start, end) per token, without BOS or other framing."""
        encoded = self._inner.backend_tokenizer.encode(text, add_special_tokens=False)
        return tuple((token, start, end) for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        text: str = self._inner.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str | None:
        """The prompt by the checkpoint's own chat template, or None if it has none or refuses these messages."""
        if self._inner.chat_template is None:
            return None
        try:
            return str(self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError, KeyError):
            return None


def load_tokenizer(folder: Path) -> CheckpointTokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder / 'tokenizer.json'} is missing; save the fast form of the tokenizer with it")
    try:
        # Not AutoTokenizer, which imports torch and every model; tokenizer.json says all that its class would.
        inner = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}: {error})") from error
    return CheckpointTokenizer(inner)


# A conversation that tells templates apart: two turns, a picture, an answer in the middle.
_PROBE_TURNS = (
    Turn("user", f"{IMAGE_PLACEHOLDER}\nQ1"),
    Turn("assistant", "A1"),
    Turn("user", "Q2"),
    Turn("assistant", None),
)
_PROBE_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q1"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A1"}]},
    {"role": "user", "content": [{"type": "text", "text": "Q2"}]},
]


def choose_template(tokenizer: CheckpointTokenizer, name: str | None) -> Template:
    """The named template, else the one that renders exactly as the checkpoint's chat template does.

    Raises CheckpointError when none does: a guess would answer badly without a sign of it.
    """
    if name is not None:
        return get_template(name)
    prompt = tokenizer.chat_prompt(_PROBE_MESSAGES)
    for template in TEMPLATES.values():
        if prompt == render(template, _PROBE_TURNS).text:
            return template
    raise CheckpointError(
        "the checkpoint's chat template is none of ours, so its prompt format is unknown; "
        f"name one of: {', '.join(sorted(TEMPLATES))}"
    )
