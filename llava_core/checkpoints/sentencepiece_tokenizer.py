"""`tokenizer.model` as the originals read it: transformers 4's slow Llama tokenizer, reimplemented on sentencepiece.

Later versions convert such a file into another kind of tokenizer, which differs at some seams. As in transformers 4,
`legacy` decides how text after a special token is tokenized. Knows no templates and no models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from llava_core.checkpoints.access import denied
from llava_core.checkpoints.token_bytes import spelled_in_pieces
from llava_core.checkpoints.tokenizer_settings import AddedToken, TokenizerSettings, read_tokenizer_settings
from llava_core.errors import CheckpointError

# A generated module, whose classes type checkers cannot see.
_ModelProto: Any = vars(sentencepiece_model_pb2)["ModelProto"]
_SPACE = "▁"

Token = tuple[int, int, int]


class SentencePieceBackend:
    """Text to ids with character offsets, and back."""

    def __init__(self, folder: Path, *, is_legacy: bool | None = None) -> None:
        """Raises CheckpointError when `tokenizer.model` is damaged. `is_legacy` None: as tokenizer_config.json says."""
        settings = read_tokenizer_settings(folder)
        self._is_legacy = settings.is_legacy is not False if is_legacy is None else is_legacy
        self._model = _load(folder / "tokenizer.model", adds_space=self._is_legacy)
        self._size: int = self._model.get_piece_size()
        self._added = _added_tokens(settings, self._model)
        beyond = [text for text, token in self._added.items() if token.id >= self.num_tokens]
        if beyond:
            raise CheckpointError(
                f"{folder}: the tokenizer gives {beyond[0]} the id {self._added[beyond[0]].id}, but has only "
                f"{self.num_tokens} tokens; ids in added_tokens.json and added_tokens_decoder must leave no gap"
            )
        self.bos_id: int | None = self.token_id(settings.bos) if settings.adds_bos else None
        self._unknown = settings.unknown
        self._unknown_length = len(self._model.encode(settings.unknown, out_type=int))

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of the special tokens, which no message may contain."""
        return frozenset(text for text, token in self._added.items() if token.is_special)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the file, plus added ones that it does not hold."""
        return len({*range(self._size), *(token.id for token in self._added.values())})

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text, None where there is none."""
        if text in self._added:
            return self._added[text].id
        found = self._model.piece_to_id(text)
        is_there = 0 <= found < self._size and self._model.id_to_piece(found) == text
        return int(found) if is_there else None

    def add_special(self, text: str) -> None:
        """Make this text a special token, with its known id or the next free one."""
        known = self.token_id(text)
        self._added[text] = AddedToken(self.num_tokens if known is None else known, is_special=True, is_named=True)

    def encode(self, text: str) -> Sequence[Token]:
        """(id, start, end) per token, without framing."""
        if not text:
            return ()
        tokens: list[Token] = []
        pieces = list(self._split(text))
        for index, (start, piece, token) in enumerate(pieces):
            if token is not None:
                tokens.append((token.id, start, start + len(piece)))
                continue
            is_first = index == 0 and not self._is_legacy
            tokens += self._encode_piece(piece, start, prefix=_SPACE if is_first else "")
        opening = pieces[0][2] if pieces else None
        if not self._is_legacy and opening is not None and not opening.is_named:
            # The space that begins every text is dropped only before tokens with a role.
            return [*self._encode_piece("", 0, prefix=_SPACE), *tokens]
        return tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        special = {token.id for token in self._added.values() if token.is_special}
        plain = {token.id: text for text, token in self._added.items() if not token.is_special}
        out, run = "", list[int]()
        for token in ids:
            if token in plain:
                out, run = out + self._model.decode(run) + plain[token], []
            elif token not in special and token < self._size:
                run.append(token)
        return out + str(self._model.decode(run))

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; an added token's text; empty for an id that is only a row of the model."""
        added = next((text for text, each in self._added.items() if each.id == token), None)
        if added is not None:
            return added.encode()
        return spelled_in_pieces(self._model.id_to_piece(token)) if token < self._size else b""

    def _split(self, text: str) -> Iterator[tuple[int, str, AddedToken | None]]:
        """Start, text and added token (or None) of each piece; white space that a token strips is left out."""
        if not self._added:
            yield 0, text, None
            return
        pattern = "|".join(re.escape(token) for token in sorted(self._added, key=len, reverse=True))
        position, strips = 0, False
        for match in re.finditer(pattern, text):
            token = self._added[match.group()]
            yield from _plain(text[position : match.start()], position, left=strips, right=token.strips_left)
            yield match.start(), match.group(), token
            position, strips = match.end(), token.strips_right
        yield from _plain(text[position:], position, left=strips, right=False)

    def _encode_piece(self, piece: str, start: int, *, prefix: str) -> Iterator[Token]:
        """Encode one piece between added tokens; offsets count from `start`, and a prefix takes up no characters."""
        text = piece if self._is_legacy else prefix + piece.replace(_SPACE, " ")
        # Without a dummy prefix the model would drop a leading space, but not after another token.
        guard = self._unknown if not self._is_legacy and text.startswith((_SPACE, " ")) else ""
        shift = len(guard) + len(text) - len(piece)
        found = self._model.encode(guard + text, return_type="offset_mapping")
        skip = self._unknown_length if guard else 0
        for token, (begin, end) in zip(found["ids"][skip:], found["offsets"][skip:], strict=True):
            yield token, start + max(0, begin - shift), start + max(0, end - shift)


def _plain(text: str, position: int, *, left: bool, right: bool) -> Iterator[tuple[int, str, None]]:
    stripped = text.lstrip() if left else text
    position += len(text) - len(stripped)
    stripped = stripped.rstrip() if right else stripped
    if stripped:
        yield position, stripped, None


def _load(file: Path, *, adds_space: bool) -> SentencePieceProcessor:
    try:
        content = _ModelProto.FromString(file.read_bytes())
        if not content.pieces:
            raise ValueError("it holds no pieces")
        if not adds_space:
            content.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=content.SerializeToString())
    except PermissionError:
        raise denied(file) from None
    except (OSError, ValueError, RuntimeError, DecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}); download it again") from error


def _added_tokens(settings: TokenizerSettings, model: SentencePieceProcessor) -> dict[str, AddedToken]:
    """Tokens that are cut out first: those listed with their ids, then those with a role, in transformers' order, since
    one without an id gets the next free one."""
    added = dict(settings.numbered)
    for text in settings.special:
        if text in added and added[text].is_special:
            added[text] = replace(added[text], is_named=True)
            continue
        number = added[text].id if text in added else model.piece_to_id(text)
        if text not in added and model.id_to_piece(number) != text:
            number = max([model.get_piece_size() - 1, *(token.id for token in added.values())]) + 1
        added[text] = AddedToken(int(number), is_special=True, is_named=True)
    return added
