"""Paths of pictures in a line of text, as terminals put them there when a file is dropped onto them.

That is in quotes, with escaped blanks, as a file: address, or as it is. A word counts as a picture only if such a file
is there and begins like a picture; anything else stays text.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

from llava_core.client.messages import HEAD_BYTES, media_type

# In quotes, or with escapes, up to the next blank.
_WORD = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|(?:\\.|[^\s\\])+""")
_ESCAPE = re.compile(r"\\(.)")


def take_pictures(line: str) -> tuple[list[Path], str]:
    """The pictures that a line begins or ends with, in its order, and what is left of it."""
    whole = _as_picture(line.strip())
    if whole is not None:
        return [whole], ""
    words = list(_WORD.finditer(line))
    first, last = 0, len(words)
    leading, trailing = [], []
    while first < last and (path := _dropped(words[first].group())) is not None:
        leading.append(path)
        first += 1
    while last > first and (path := _dropped(words[last - 1].group())) is not None:
        trailing.append(path)
        last -= 1
    if not leading and not trailing:
        return [], line
    text = line[words[first].start() : words[last - 1].end()] if first < last else ""
    return leading + trailing[::-1], text


def read_path(text: str) -> Path:
    """The path that somebody typed or dropped, without quotes and escapes; a file of that very name comes first."""
    as_it_is = Path(text).expanduser()
    if as_it_is.exists():
        return as_it_is
    return Path(_unquote(text)).expanduser()


def _dropped(word: str) -> Path | None:
    return _as_picture(_unquote(word))


def _unquote(word: str) -> str:
    if len(word) >= 2 and word[0] == word[-1] == "'":
        text = word[1:-1]
    elif len(word) >= 2 and word[0] == word[-1] == '"':
        text = _ESCAPE.sub(r"\1", word[1:-1])
    else:
        text = _ESCAPE.sub(r"\1", word)
    return urllib.parse.unquote(text.removeprefix("file://")) if text.startswith("file:///") else text


def _as_picture(text: str) -> Path | None:
    """A bare word may be the name of a file by chance, so it takes a suffix or a slash."""
    if "\0" in text or not ("/" in text or Path(text).suffix):
        return None
    try:
        path = Path(text).expanduser()
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return path if media_type(file.read(HEAD_BYTES)) else None
    except (OSError, RuntimeError):
        # Too long for a name, not ours to read, or the home of somebody who is not there: text.
        return None
