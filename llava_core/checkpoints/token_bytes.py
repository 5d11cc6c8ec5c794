"""The bytes of single tokens, from their vocabulary entries, to identify tokens in log-probabilities.

Decoding a token on its own loses parts that depend on its neighbours, such as half a character or a leading space.
Knows the two ways in which vocabularies spell bytes, and no tokenizer.
"""

import re
from functools import cache

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def spelled_in_pieces(entry: str) -> bytes:
    """SentencePiece: `▁` is a space, `<0xE2>` a byte that is not a character on its own."""
    byte = _BYTE.fullmatch(entry)
    return bytes([int(byte[1], 16)]) if byte else entry.replace(_SPACE, " ").encode()


def spelled_in_bytes(entry: str) -> bytes:
    """Byte-level BPE: each character stands for a byte."""
    values = _byte_values()
    return bytes(values[character] for character in entry)


@cache
def _byte_values() -> dict[str, int]:
    """GPT-2's mapping: printable bytes stand for themselves, the others for characters from 256 on, in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in printed]
    return {chr(value): value for value in printed} | {chr(256 + n): value for n, value in enumerate(hidden)}
