"""One visitor's questions and answers, as values. Knows neither Gradio nor HTTP.

A visitor's talk is a tuple of turns. It is never changed: continuing it makes a new tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llava_core.client.messages import DICOM, media_type, read_picture
from llava_core.client.requests import Options
from llava_core.errors import RequestError
from llava_core.types import ImagePart, Message, TextPart
from llava_core.views import DicomView


@dataclass(frozen=True)
class Choices:
    """What a visitor can choose about an answer. `template` and `seed` may be left to the service."""

    model: str = ""
    template: str | None = None
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None

    def options(self) -> Options:
        """Return the options for the client."""
        options = Options(
            temperature=self.temperature, top_p=self.top_p, max_tokens=self.max_tokens, image_transforms=True
        )
        if self.model:
            options["model"] = self.model
        if self.seed is not None:
            options["seed"] = self.seed
        if self.template is not None:
            options["extra"] = {"template": self.template}
        return options


@dataclass(frozen=True)
class Turn:
    """A question, with its pictures' paths, and its answer. DICOM files among them are rendered by `view`, or by their
    own settings without one.

    `figures` tell what the answer cost; `problem` why it is missing or incomplete. `is_open` is true while it is being
    written. `vote` is the visitor's opinion of it.
    """

    question: str = field(repr=False)
    pictures: tuple[str, ...] = field(default=(), repr=False)
    answer: str = field(default="", repr=False)
    figures: str = ""
    problem: str = ""
    is_open: bool = False
    vote: str = ""
    view: DicomView | None = None

    @property
    def asked(self) -> Message:
        """The question as it is sent. Raises RequestError where a picture no longer exists."""
        return Message("user", (*(_picture(path, self.view) for path in self.pictures), TextPart(self.question)))

    def begun(self) -> Turn:
        """Return the same question, open and unanswered."""
        return Turn(self.question, self.pictures, is_open=True, view=self.view)


Talk = tuple[Turn, ...]


def history(talk: Sequence[Turn]) -> list[Message]:
    """Return the messages before the next question. Unanswered questions are left out. Raises RequestError like
    `asked`."""
    said: list[Message] = []
    for turn in talk:
        if turn.answer:
            said += [turn.asked, Message("assistant", (TextPart(turn.answer),))]
    return said


def _picture(path: str, view: DicomView | None) -> ImagePart:
    try:
        data = read_picture(Path(path))
        return ImagePart(data, dicom=view if media_type(data) == DICOM else None)
    except RequestError as error:
        # The original message names a path, which means nothing to a visitor.
        message = "a picture of this conversation is no longer kept here; clear the conversation and upload it again"
        raise RequestError(message, param="image") from error
