"""A checkpoint's tokenizer behind the small interfaces the project needs: prompts to ids, ids to text and to bytes.

Chooses among a folder's files, and decides whether a prompt begins with BOS, as transformers and the original code do.
Knows nothing about weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from llava_core.checkpoints.access import denied
from llava_core.checkpoints.files import naming, read_json
from llava_core.checkpoints.layout import Checkpoint, open_checkpoint
from llava_core.checkpoints.original_config import is_original_config
from llava_core.checkpoints.token_bytes import spelled_in_bytes, spelled_in_pieces
from llava_core.checkpoints.tokenizer_settings import TokenizerSettings, read_tokenizer_settings
from llava_core.config import BIOVIL_T, ModelConfig
from llava_core.errors import CheckpointError
from llava_core.fields import Fields
from llava_core.prompts.conversation import IMAGE_END, IMAGE_PLACEHOLDER, IMAGE_START, Turn, render
from llava_core.prompts.templates import TEMPLATES, Template, get_template

logger = logging.getLogger(__name__)
_IMAGE_PATCH = "<im_patch>"
# Classes of transformers that prepend BOS whatever tokenizer.json says, unless `add_bos_token` is false.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")

# Class names in transformers 4 and 5 for a tokenizer defined by its tokenizer.json alone.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class Backend(Protocol):
    """A tokenizer of any kind. Offsets are in characters of the text."""

    bos_id: int | None

    @property
    def num_tokens(self) -> int:
        """Number of token ids."""
        ...

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts that become control tokens."""
        ...

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text."""
        ...

    def add_special(self, text: str) -> None:
        """Add a special token with the next free id."""
        ...

    def encode(self, text: str) -> Sequence[tuple[int, int, int]]:
        """(id, start, end) per token, without framing."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; for a control token, its name."""
        ...


class FastBackend:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, inner: PreTrainedTokenizerFast, *, settings: TokenizerSettings | None = None) -> None:
        self._inner = inner
        framing = inner.backend_tokenizer.encode("", add_special_tokens=True).ids
        adds_bos = framing[:1] == [inner.bos_token_id]
        if settings is not None and settings.kind in _LLAMA_CLASSES:
            adds_bos = settings.adds_bos
        self.bos_id: int | None = inner.bos_token_id if adds_bos else None
        self._spelled = spelled_in_bytes if _is_byte_level(inner) else spelled_in_pieces
        self._added = _added_texts(inner)

    @property
    def num_tokens(self) -> int:
        """Number of token ids, including added ones."""
        return len(self._inner)

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of special tokens. Not `all_special_tokens`, which omits those that only tokenizer.json knows."""
        return frozenset(token.content for token in self._inner.added_tokens_decoder.values() if token.special)

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text, None where there is none."""
        found: int | None = self._inner.backend_tokenizer.token_to_id(text)
        return found

    def add_special(self, text: str) -> None:
        """Add a special token with the next free id."""
        self._inner.add_tokens([text], special_tokens=True)
        self._added = _added_texts(self._inner)

    def encode(self, text: str) -> Sequence[tuple[int, int, int]]:
        """(id, start, end) per token, without BOS or other framing."""
        encoded = self._inner.backend_tokenizer.encode(text, add_special_tokens=False)
        return tuple((token, start, end) for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        text: str = self._inner.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; an added token's text; empty for an id that is only a row of the model."""
        if token in self._added:
            return self._added[token].encode()
        entry: str | None = self._inner.backend_tokenizer.id_to_token(token)
        return b"" if entry is None else self._spelled(entry)


def _added_texts(inner: PreTrainedTokenizerFast) -> dict[int, str]:
    """Texts of added tokens by id. Read once, because the library rebuilds them on every access."""
    return {number: token.content for number, token in inner.added_tokens_decoder.items()}


def _is_byte_level(inner: PreTrainedTokenizerFast) -> bool:
    decoder = json.loads(inner.backend_tokenizer.to_str())["decoder"] or {}
    return any(each["type"] == "ByteLevel" for each in [decoder, *decoder.get("decoders", ())] if each)


class CheckpointTokenizer:
    """Satisfies prompts.tokenize.Tokenizer, prepare.TextTokenizer and engine.detokenize.Decoder."""

    def __init__(self, inner: PreTrainedTokenizerFast | Backend) -> None:
        self._inner = inner if isinstance(inner, PreTrainedTokenizerFast) else None
        self.backend: Backend = FastBackend(inner) if isinstance(inner, PreTrainedTokenizerFast) else inner
        self.encode = self.backend.encode
        self.decode = self.backend.decode
        self.token_bytes = self.backend.token_bytes
        self.bos_id: int | None = self.backend.bos_id
        # Text that would turn into control tokens; users' messages must not hold it.
        self.reserved_texts = frozenset(self.backend.special_texts | {IMAGE_PLACEHOLDER}) - {""}

    @property
    def num_tokens(self) -> int:
        """Number of token ids, including added ones."""
        return self.backend.num_tokens

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str | None:
        """The prompt by the checkpoint's own chat template, or None if it has none or refuses these messages."""
        if self._inner is None or self._inner.chat_template is None:
            return None
        try:
            return str(self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError, KeyError):
            return None


def load_tokenizer(checkpoint: Path | Checkpoint) -> CheckpointTokenizer:
    """Load a checkpoint's tokenizer. Raises CheckpointError when it is missing, damaged, or lacks a token."""
    if isinstance(checkpoint, Path):
        is_original = (checkpoint / "config.json").exists() and is_original_config(read_json(checkpoint, "config.json"))
        if not is_original:
            return CheckpointTokenizer(_load_fast(checkpoint))
        checkpoint = open_checkpoint(checkpoint)
    if checkpoint.config.dialect == "llava_hf":
        return CheckpointTokenizer(_load_fast(checkpoint.text_folder))
    tokenizer = _load_original(checkpoint)
    _add_image_tokens(tokenizer, checkpoint)
    return CheckpointTokenizer(tokenizer)


def _load_fast(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder / 'tokenizer.json'} is missing; save the fast form of the tokenizer with it")
    # Not AutoTokenizer, which imports torch and every model; tokenizer.json holds all the class would add.
    return read_tokenizer(PreTrainedTokenizerFast, folder)


def read_tokenizer(kind: type[PreTrainedTokenizerFast], folder: Path) -> PreTrainedTokenizerFast:
    """Read a folder's tokenizer with this transformers class. Raises CheckpointError when it cannot be read."""
    read_tokenizer_settings(folder)
    file = folder / ("tokenizer.json" if (folder / "tokenizer.json").exists() else "tokenizer.model")
    try:
        loaded: PreTrainedTokenizerFast = kind.from_pretrained(folder, local_files_only=True)
    except PermissionError:
        raise denied(file) from None
    # The tokenizers library raises Exception itself, not a subclass.
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}); download it again") from error
    return loaded


def _load_original(checkpoint: Checkpoint) -> Backend:
    """Load as the original code does: the slow form where there is one, but the fast one for a whole Mistral."""
    folder = checkpoint.text_folder
    settings = read_tokenizer_settings(folder)
    wants_fast = checkpoint.config.text["model_type"] == "mistral" and checkpoint.is_complete
    has_slow, has_fast = ((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    if settings.kind in _PLAIN_CLASSES:
        has_slow = has_slow and not has_fast
    if has_slow and not (wants_fast and has_fast):
        from llava_core.checkpoints.sentencepiece_tokenizer import SentencePieceBackend

        # The fast form into which transformers converts a slow file is the legacy one.
        return SentencePieceBackend(folder, is_legacy=True if wants_fast else None)
    if not has_fast:
        raise CheckpointError(f"{folder} has neither tokenizer.model nor tokenizer.json; copy them from the base model")
    return FastBackend(_load_fast(folder), settings=settings)


def _add_image_tokens(tokenizer: Backend, checkpoint: Checkpoint) -> None:
    """Add the tokens that the original code adds when it loads a model, where the embeddings have rows for them."""
    rows, folder = checkpoint.config.vocab_size, checkpoint.folder
    with naming(folder / "config.json"):
        has_patch_token = Fields(checkpoint.settings).flag("mm_use_im_patch_token", True)
    wanted = [IMAGE_START, IMAGE_END] if checkpoint.config.image_start_end else []
    # Prompts never contain the patch token, so a missing row does no harm.
    if (
        has_patch_token
        and tokenizer.num_tokens + len([text for text in wanted if tokenizer.token_id(text) is None]) < rows
    ):
        wanted = [_IMAGE_PATCH, *wanted]
    for text in wanted:
        if tokenizer.token_id(text) is None:
            tokenizer.add_special(text)
    for text in wanted:
        number = tokenizer.token_id(text)
        if number is None or number >= rows:
            raise CheckpointError(
                f"{folder / 'config.json'}: mm_use_im_start_end asks for {text}, but the tokenizer of "
                f"{checkpoint.text_folder} does not have it and vocab_size {rows} leaves it no row; "
                "use the tokenizer that was saved with the model"
            )


# A conversation that distinguishes templates: two turns, a picture, an answer in the middle.
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


def choose_template(tokenizer: CheckpointTokenizer, name: str | None, config: ModelConfig | None = None) -> Template:
    """The named template, else the one that renders exactly as the checkpoint's chat template does.

    An original checkpoint has no chat template; its `config` decides as far as possible. Raises CheckpointError when
    nothing does: a wrong guess would silently give bad answers.
    """
    if name is not None:
        return get_template(name)
    if config is not None and config.dialect == "original":
        return _template_of(config)
    prompt = tokenizer.chat_prompt(_PROBE_MESSAGES)
    for template in TEMPLATES.values():
        if prompt == render(template, _PROBE_TURNS).text:
            return template
    raise CheckpointError(
        "the checkpoint's chat template is none of ours, so its prompt format is unknown; "
        f"name one of: {', '.join(sorted(TEMPLATES))}"
    )


def _template_of(config: ModelConfig) -> Template:
    """The template that released models of this shape were trained with; LLaVA-1.5 and 1.6 use Vicuna's."""
    if config.vision.architecture["model_type"] == BIOVIL_T:
        name = "radialog"
    elif config.text["model_type"] == "mistral":
        name = "mistral_instruct"
    elif config.vocab_size >= 64_000 and config.eos_token_ids == (7,):
        name = "chatml_direct"
    elif config.projector_type != "linear" and not config.image_start_end:
        name = "vicuna_v1"
    else:
        raise CheckpointError(
            "nothing in this checkpoint says which prompt format it was trained with; "
            f"name one of: {', '.join(sorted(TEMPLATES))} with --template"
        )
    logger.info("the checkpoint names no prompt format; %s fits its configuration", name)
    return get_template(name)
