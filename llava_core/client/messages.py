"""Questions and pictures as messages, and messages as OpenAI's JSON.

A picture is a path, encoded bytes, an image of Pillow's or an address, or a part that also says how it is looked at. It
travels as the bytes it has. Sends nothing, and leaves judging pictures to whoever decodes them.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_core.errors import RequestError
from llava_core.types import ImagePart, ImageUrl, Message, TextPart

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | os.PathLike[str] | bytes | Image | ImagePart | ImageUrl
else:
    Picture = Any

Json = dict[str, Any]

DICOM = "application/dicom"
# Where in the file, what stands there, and what it is called.
_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (8, b"WEBP", "image/webp"),
    (0, b"GIF8", "image/gif"),
    (0, b"BM", "image/bmp"),
    (0, b"II*\0", "image/tiff"),
    (0, b"MM\0*", "image/tiff"),
    (0, b"II+\0", "image/tiff"),
    (0, b"MM\0+", "image/tiff"),
    (128, b"DICM", DICOM),
)
# As many bytes as `media_type` looks at.
HEAD_BYTES = 132


def user_message(question: str | Message, pictures: Sequence[Picture] = ()) -> Message:
    """What a user says: pictures first, as LLaVA was trained. A message is taken as it is, and has its own pictures."""
    if isinstance(question, Message):
        if pictures:
            raise TypeError("a Message has its own pictures; give them as its parts")
        return question
    return Message("user", (*map(picture_part, pictures), TextPart(question)))


def picture_part(picture: Picture) -> ImagePart | ImageUrl:
    """Whatever a picture is given as, as part of a message. Raises RequestError for a file that cannot be read."""
    if isinstance(picture, ImagePart | ImageUrl):
        return picture
    if isinstance(picture, bytes):
        return ImagePart(picture)
    if isinstance(picture, str) and is_address(picture):
        return ImageUrl(picture)
    if isinstance(picture, str | os.PathLike):
        return ImagePart(read_picture(Path(picture)))
    return ImagePart(_encode(picture))


def is_address(text: str) -> bool:
    """Whether a text is the address of a picture rather than a path."""
    return text[:8].lower().startswith(("http://", "https://", "data:"))


def read_picture(path: Path) -> bytes:
    """The bytes of a file. Raises RequestError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", param="image", code="unreadable_file") from error


def media_type(data: bytes) -> str | None:
    """What a file that begins like this is, if it is a picture of a known kind."""
    return next((kind for at, mark, kind in _SIGNATURES if data.startswith(mark, at)), None)


def data_url(data: bytes) -> str:
    """The picture as an address. What is of no known kind is for the service to judge."""
    return f"data:{media_type(data) or 'image/unknown'};base64,{base64.b64encode(data).decode()}"


def message_json(message: Message) -> Json:
    """A message in OpenAI's form."""
    if all(isinstance(part, TextPart) for part in message.parts):
        return {
            "role": message.role,
            "content": "".join(part.text for part in message.parts if isinstance(part, TextPart)),
        }
    return {"role": message.role, "content": list(map(_part_json, message.parts))}


def _part_json(part: TextPart | ImagePart | ImageUrl) -> Json:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    url = part.url if isinstance(part, ImageUrl) else data_url(part.data)
    image: Json = {"url": url}
    if part.low_detail:
        image["detail"] = "low"
    if part.dicom is not None:
        image["dicom"] = asdict(part.dicom)
    return {"type": "image_url", "image_url": image}


def _encode(picture: Image) -> bytes:
    from PIL.Image import Image

    if not isinstance(picture, Image):
        raise TypeError(f"a picture is a path, an address, bytes or an image of Pillow's, not {type(picture).__name__}")
    buffer = io.BytesIO()
    try:
        picture.save(buffer, "PNG")
    except OSError:
        # A mode that PNG does not have, such as CMYK.
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
