"""The bytes of single tokens, from their entries in a vocabulary: what log-probabilities name tokens by.

Decoding a token on its own loses what a neighbour would complete: half a character, a leading space. Knows the two ways
in which vocabularies spell bytes, and no tokenizer.
"""

import re
from functools import cache

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def spelled_in_pieces(entry: str) -> bytes:
    """SentencePiece: `▁` is a space, `<0xE2>` a byte that is no character by itself."""
    byte = _BYTE.fullmatch(entry)
    return bytes([int(byte[1], 16)]) if byte else entry.replace(_SPACE, " ").encode()


def spelled_in_bytes(entry: str) -> bytes:
    """Byte-level BPE: each character stands for a byte."""
    values = _byte_values()
    return bytes(values[character] for character in entry)


@cache
def _byte_values() -> dict[str, int]:
    """As GPT-2 has it: bytes that print as a letter are that letter, the others follow from 256 on, in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in printed]
    return {chr(value): value for value in printed} | {chr(256 + n): value for n, value in enumerate(hidden)}
