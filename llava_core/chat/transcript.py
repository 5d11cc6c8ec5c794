"""A conversation as a JSON file, readable by people and loadable again: texts first, then pictures by number."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llava_core.client.messages import data_url, is_address
from llava_core.errors import RequestError
from llava_core.types import ImagePart, ImageUrl, Message, TextPart
from llava_core.views import DicomView

FORMAT = "llava-chat-1"
Part = TextPart | ImagePart | ImageUrl


@dataclass(frozen=True)
class Transcript:
    """A transcript file's contents. `model` is the name of the model that answered."""

    model: str
    system: str | None
    messages: tuple[Message, ...]

    def dump(self) -> str:
        """The text of the file; a repeated picture is stored once."""
        numbers: dict[str, int] = {}
        messages = [
            {"role": message.role, "content": [_part_json(part, numbers) for part in message.parts]}
            for message in self.messages
        ]
        images = {str(number): url for url, number in numbers.items()}
        content = {"format": FORMAT, "model": self.model, "system": self.system, "messages": messages, "images": images}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def load_transcript(path: Path) -> Transcript:
    """Load a transcript. Raises RequestError naming the file and the problem."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", param="load") from error
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}", param="load") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RequestError(f"{path} is not a saved chat: its `format` is not {FORMAT}", param="load")
    try:
        images = {number: _read_image(url) for number, url in content["images"].items()}
        messages = tuple(_read_message(message, images) for message in content["messages"])
        return Transcript(_text(content["model"]), content["system"] and _text(content["system"]), messages)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise RequestError(f"{path} is a damaged chat: {type(error).__name__}: {error}", param="load") from error


def pictures_of(messages: Iterable[Message]) -> list[ImagePart | ImageUrl]:
    """Every picture, in order."""
    return [part for message in messages for part in message.parts if not isinstance(part, TextPart)]


def text_of(parts: Sequence[Part]) -> str:
    """The text of the parts, joined."""
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _part_json(part: Part, numbers: dict[str, int]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    url = part.url if isinstance(part, ImageUrl) else data_url(part.data)
    image: dict[str, Any] = {"image": numbers.setdefault(url, len(numbers) + 1)}
    return image if part.dicom is None else image | {"dicom": asdict(part.dicom)}


def _read_message(message: Any, images: dict[str, ImagePart | ImageUrl]) -> Message:
    role = message["role"]
    if role not in ("user", "assistant"):
        raise ValueError(f"role must be user or assistant, not {role!r}")
    return Message(role, tuple(_read_part(part, images) for part in message["content"]))


def _read_part(part: Any, images: dict[str, ImagePart | ImageUrl]) -> Part:
    if "text" in part:
        return TextPart(_text(part["text"]))
    image, view = images[str(part["image"])], part.get("dicom")
    return image if view is None else replace(image, dicom=_read_view(**view))


def _read_view(*, frame: Any, window: Any) -> DicomView:
    if not isinstance(frame, int):
        raise TypeError(f"a frame is a number, not {type(frame).__name__}")
    return DicomView(frame, (window[0], window[1]) if isinstance(window, list) else window)


def _read_image(url: Any) -> ImagePart | ImageUrl:
    head, found, payload = _text(url).partition(";base64,")
    if found and head.startswith("data:"):
        try:
            return ImagePart(base64.b64decode(payload, validate=True))
        except ValueError as error:
            raise ValueError(f"a picture is not base64: {error}") from error
    if not is_address(url):
        raise ValueError(f"{url[:50]!r} is not the address of a picture")
    return ImageUrl(url)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text is wanted, not {type(value).__name__}")
    return value
