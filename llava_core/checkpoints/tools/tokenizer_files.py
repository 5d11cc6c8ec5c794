"""An original checkpoint's tokenizer as transformers' llava-hf models need it: one tokenizer.json with `<image>` in it.

A checkpoint that has only tokenizer.model gets the fast form into which transformers converts it, which may tokenize
text after a special token differently from the original's slow one. Knows no weights.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, LlamaTokenizer, PreTrainedTokenizerFast

from llava_core.checkpoints.layout import Checkpoint
from llava_core.checkpoints.tokenizer import load_tokenizer, read_tokenizer
from llava_core.errors import CheckpointError
from llava_core.prompts.conversation import IMAGE_PLACEHOLDER

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def with_image_token(checkpoint: Checkpoint) -> tuple[PreTrainedTokenizerFast, int]:
    """The tokenizer, and the id of `<image>`: its existing id, or the first free one.

    Raises CheckpointError when the tokenizer is missing or has more tokens than the embeddings have rows.
    """
    folder = checkpoint.text_folder
    inner = _load(folder)
    rows = checkpoint.config.vocab_size
    if len(inner) > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(inner)} tokens, but config.json's vocab_size is {rows}"
        )
    raw = inner.backend_tokenizer
    bos = load_tokenizer(checkpoint).bos_id
    if bos is not None:
        text = raw.id_to_token(bos)
        raw.post_processor = TemplateProcessing(single=f"{text} $A", special_tokens=[(text, bos)])
    roles = {role: str(token) for role in _ROLES if (token := getattr(inner, role)) is not None}
    # Batches need a padding token, and Llama's tokenizers have none.
    if filler := roles.get("unk_token", roles.get("eos_token")):
        roles.setdefault("pad_token", filler)
    # Not the original class, which would override tokenizer.json's handling of BOS.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **roles)
    tokenizer.chat_template = inner.chat_template
    image = AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]})
    # From the new tokenizer, which holds a copy of `raw`.
    image_id = tokenizer.backend_tokenizer.token_to_id(IMAGE_PLACEHOLDER)
    assert image_id is not None
    return tokenizer, image_id


def changed_tokens(before: Path, now: Path) -> list[str]:
    """Tokens that only one of two folders has, or that have different ids in the two; `<image>` is ignored."""
    was, has = (_load(folder).get_vocab().items() for folder in (before, now))
    return sorted({text for text, _ in was ^ has} - {IMAGE_PLACEHOLDER})


def _load(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").exists():
        return read_tokenizer(PreTrainedTokenizerFast, folder)
    if not (folder / "tokenizer.model").exists():
        raise CheckpointError(f"{folder} has neither tokenizer.json nor tokenizer.model; copy them from the base model")
    return read_tokenizer(LlamaTokenizer, folder)
