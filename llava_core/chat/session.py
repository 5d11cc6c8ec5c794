"""One chat from its first prompt to its end: lines become pictures, commands or questions.

Knows the source of answers only as a Backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava_core.chat.backends import Backend
from llava_core.chat.pictures import read_path, take_pictures
from llava_core.chat.terminal import FENCE, Terminal
from llava_core.chat.transcript import Transcript, load_transcript, pictures_of
from llava_core.client.messages import DICOM, is_address, media_type, picture_part
from llava_core.errors import LlavaError, RequestError
from llava_core.types import ImagePart, ImageUrl, Message, TextPart
from llava_core.views import DicomView, read_frame, read_window

PROMPT = ">>> "
HELP = f"""\
/image PATH    add a picture to the next question; you can also drop a file onto the terminal
/window C,W    view DICOM files from here on with this centre and width, or with the file's own window of this number;
               without an argument, with the file's first
/frame N       view this frame of DICOM files from here on; without N, the first
/system TEXT   replace the system text; without TEXT, return to the model's own
/clear         forget the conversation and its pictures
/save FILE     write the conversation to FILE
/load FILE     resume the conversation in FILE
/help          show this help
/exit          end the chat, as does Ctrl-D; Ctrl-C stops an answer
{FENCE}            begins and ends a text of several lines"""


@dataclass
class Session:
    """`view` is the view of DICOM files added from here on. `num_failed` counts lines that could not be answered."""

    backend: Backend
    terminal: Terminal
    system: str | None = None
    view: DicomView | None = None
    messages: list[Message] = field(default_factory=list)
    num_failed: int = 0
    _pending: list[ImagePart | ImageUrl] = field(default_factory=list)
    # Files that this chat may overwrite.
    _own: set[Path] = field(default_factory=set)

    def run(self) -> None:
        """Read and handle lines until the input ends."""
        while True:
            try:
                line = self.terminal.read(PROMPT)
                if line.strip() in ("/exit", "/quit"):
                    return
                self._take(line)
            except EOFError:
                if self.terminal.is_interactive:
                    self.terminal.end_line()
                return
            except KeyboardInterrupt:
                if not self.terminal.is_interactive:
                    raise
                # As in a shell: the line is dropped.
                self.terminal.end_line()
            except LlavaError as error:
                self.num_failed += 1
                self.terminal.warn(f"error: {error}")

    def load(self, path: Path) -> None:
        """Resume a saved conversation."""
        transcript = load_transcript(path)
        self._check(*pictures_of(transcript.messages))
        self.messages, self.system, self._pending = list(transcript.messages), transcript.system, []
        self._own.add(path.resolve())
        self.terminal.note(f"{len(self.messages)} messages of {path}, answered by {transcript.model}")

    def _take(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        command = _COMMANDS.get(name)
        if command is not None:
            command(self, argument.strip())
            return
        paths, text = take_pictures(line)
        for path in paths:
            self._attach(path)
        if text.startswith("/"):
            word = text.split()[0]
            what = "not a picture that can be read" if "/" in word[1:] else "not a command; /help lists them"
            raise RequestError(f"{word} is {what}")
        if text.strip():
            self._ask(text)

    def _ask(self, text: str) -> None:
        question = Message("user", (*self._pending, TextPart(text)))
        written: list[str] = []
        reason = None
        try:
            # Closed at once, not at garbage collection.
            with closing(self.backend.answer(self.messages, question, self.system)) as answer:
                for delta in answer:
                    # Recorded first, so that on an interrupt it includes everything shown.
                    written.append(delta.text)
                    self.terminal.stream(delta.text)
                    reason = delta.finish_reason or reason
        except KeyboardInterrupt:
            if not self.terminal.is_interactive:
                raise
            reason = "interrupt"
        except LlavaError:
            if written:
                self.terminal.end_line()
                self.terminal.note("(the answer is incomplete and not part of the conversation; ask again)")
            raise
        self.terminal.end_line()
        self._pending = []
        if "".join(written):
            self.messages += [question, Message("assistant", (TextPart("".join(written)),))]
        if self.terminal.is_interactive and reason in _REMARKS:
            self.terminal.note(_REMARKS[reason])

    def _image(self, argument: str) -> None:
        _need(argument, "/image PATH")
        self._attach(argument if is_address(argument) else read_path(argument))

    def _attach(self, picture: str | Path) -> None:
        part = picture_part(picture)
        kind = media_type(part.data) if isinstance(part, ImagePart) else DICOM
        if kind is None:
            raise RequestError(f"{picture} is not a picture of a known kind")
        # The kind of a file behind a URL is not known yet; whoever has chosen a frame or a window means a DICOM file.
        if kind == DICOM:
            part = replace(part, dicom=self.view)
        self._check(part)
        self._pending.append(part)
        self.terminal.note(f"picture {len(pictures_of(self.messages)) + len(self._pending)}: {picture}")

    def _check(self, *pictures: ImagePart | ImageUrl) -> None:
        if not self.backend.takes_addresses and any(isinstance(picture, ImageUrl) for picture in pictures):
            raise RequestError("only a service (--url) can fetch pictures by address; give a file")

    def _window(self, argument: str) -> None:
        try:
            window = read_window(argument) if argument else None
        except ValueError as error:
            raise RequestError(str(error)) from None
        self._look(replace(self.view or DicomView(), window=window))

    def _frame(self, argument: str) -> None:
        try:
            frame = read_frame(argument) if argument else 1
        except ValueError as error:
            raise RequestError(str(error)) from None
        self._look(replace(self.view or DicomView(), frame=frame))

    def _look(self, view: DicomView) -> None:
        self.view = None if view == DicomView() else view
        window = "as the file says" if view.window is None else f"window {view.window}"
        self.terminal.note(f"DICOM files from here on: frame {view.frame}, {window}")

    def _system(self, argument: str) -> None:
        self.system = argument or None
        self.terminal.note("a new system text" if argument else "the model's own system text")

    def _clear(self, _argument: str) -> None:
        self.messages, self._pending = [], []
        self.terminal.note("the conversation is empty")

    def _save(self, argument: str) -> None:
        _need(argument, "/save FILE")
        path = Path(argument).expanduser()
        text = Transcript(self.backend.name, self.system, tuple(self.messages)).dump()
        try:
            if path.resolve() in self._own:
                # A half-written file must not take the place of a whole one.
                new = path.with_name(f"{path.name}.new")
                new.write_text(text, encoding="utf-8")
                os.replace(new, path)
            else:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
        except FileExistsError:
            raise RequestError(f"{path} exists already and is not this chat's own; choose another name") from None
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}") from error
        self._own.add(path.resolve())
        self.terminal.note(f"{len(self.messages)} messages written to {path}")

    def _load(self, argument: str) -> None:
        _need(argument, "/load FILE")
        self.load(Path(argument).expanduser())

    def _help(self, _argument: str) -> None:
        self.terminal.note(HELP)


def _need(argument: str, usage: str) -> None:
    if not argument:
        raise RequestError(f"usage: {usage}")


_REMARKS = {"interrupt": "(stopped)", "length": "(cut off at the token limit)"}
_COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "/image": Session._image,
    "/window": Session._window,
    "/frame": Session._frame,
    "/system": Session._system,
    "/clear": Session._clear,
    "/save": Session._save,
    "/load": Session._load,
    "/help": Session._help,
}
