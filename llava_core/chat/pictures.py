"""Finds picture paths in a line of text, as terminals insert them when a file is dropped onto them.

They may be quoted, have escaped spaces, be file: URLs, or be plain. A word counts as a picture only if the file exists
and begins like a picture; anything else stays text.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

from llava_core.client.messages import HEAD_BYTES, media_type

# Quoted, or with escapes, up to the next space.
_WORD = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|(?:\\.|[^\s\\])+""")
_ESCAPE = re.compile(r"\\(.)")


def take_pictures(line: str) -> tuple[list[Path], str]:
    """The pictures that a line begins or ends with, in order, and the rest of the line."""
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
    """A typed or dropped path, without quotes and escapes; a file with literally this name takes precedence."""
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
    """The path if it is a picture. A bare word may match a file's name by chance, so a suffix or slash is required."""
    if "\0" in text or not ("/" in text or Path(text).suffix):
        return None
    try:
        path = Path(text).expanduser()
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return path if media_type(file.read(HEAD_BYTES)) else None
    except (OSError, RuntimeError):
        # A name that is too long, a file that may not be read, or the home of an unknown user: text.
        return None
