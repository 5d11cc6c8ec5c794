"""A terminal, or a pipe in place of one: reading lines, showing text, and the history of typed lines.

If input and output are a terminal, lines can be edited and recalled. Otherwise lines are read unedited, remarks go to
standard error, and only answers to standard output. Knows nothing about the conversation.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

try:
    import readline
except ImportError:  # A Python built without readline can still chat.
    readline = None  # type: ignore[assignment]

# Begins and ends a text of several lines.
FENCE = '"""'
_HISTORY_LINES = 1000
# A model's text must not move the cursor or rename the window.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """`history` is the file of lines typed before, None for none."""

    def __init__(self, history: Path | None) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._is_plain = (
            not self.is_interactive or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
        )
        for stream in (sys.stdin, sys.stdout):
            # Neither undecodable input nor unencodable output may end a chat.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        self._history = history if self.is_interactive and readline else None

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Save lines typed within the block for the next chat. Problems with the history file are reported."""
        if self._history is None:
            yield
            return
        # No completion: a tab is inserted as typed.
        readline.parse_and_bind("tab: self-insert")
        readline.set_history_length(_HISTORY_LINES)
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            # Private to the user.
            self._history.touch(mode=0o600)
            readline.read_history_file(self._history)
        except OSError as error:
            self.warn(f"no history: {self._history}: {error.strerror}")
            yield
            return
        try:
            yield
        finally:
            readline.write_history_file(self._history)

    def read(self, prompt: str) -> str:
        """Read a line, or the lines between two FENCEs. Raises EOFError at the end, and KeyboardInterrupt."""
        line = self._line(prompt)
        if not line.lstrip().startswith(FENCE):
            return line
        text = line.lstrip().removeprefix(FENCE)
        # The end of the input also ends the text.
        with contextlib.suppress(EOFError):
            while not text.rstrip().endswith(FENCE):
                text += "\n" + self._line("... ")
        return text.rstrip().removesuffix(FENCE).strip("\n")

    def stream(self, text: str) -> None:
        """Show a piece of an answer at once."""
        shown = _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if self.is_interactive else text
        # `color=True`, because click would strip escape codes when writing to a file.
        click.echo(shown, nl=False, color=True)

    def end_line(self) -> None:
        """End the line after an answer."""
        click.echo()

    def note(self, text: str) -> None:
        """Show a remark outside the conversation."""
        click.echo(self._paint(_CONTROLS.sub(" ", text), dim=True), err=not self.is_interactive)

    def warn(self, text: str) -> None:
        """Show an error."""
        click.echo(self._paint(_CONTROLS.sub(" ", text), fg="red"), err=not self.is_interactive)

    def _line(self, prompt: str) -> str:
        if not self.is_interactive:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.rstrip("\r\n")
        # readline does not count characters between \001 and \002.
        shown = prompt if self._is_plain else f"\001\033[1;32m\002{prompt}\001\033[0m\002"
        return input(shown)

    def _paint(self, text: str, *, dim: bool = False, fg: str | None = None) -> str:
        return text if self._is_plain else click.style(text, dim=dim, fg=fg)


def default_history() -> Path:
    """The history file's path, by the XDG base directory specification."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llava" / "chat_history"
