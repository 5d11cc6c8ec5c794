"""Questions and pictures as messages, and messages as OpenAI's JSON.

A picture is a path, encoded bytes, a Pillow image or a URL, or a message part that can also specify its view. Encoded
pictures are sent unchanged. Sends nothing itself, and leaves validating pictures to the code that decodes them.
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
# Offset in the file, the bytes there, and the media type.
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
# The number of bytes that `media_type` looks at.
HEAD_BYTES = 132


def user_message(question: str | Message, pictures: Sequence[Picture] = ()) -> Message:
    """A user's message: pictures first, as LLaVA was trained. A Message is used unchanged, with its own pictures."""
    if isinstance(question, Message):
        if pictures:
            raise TypeError("a Message has its own pictures; give them as its parts")
        return question
    return Message("user", (*map(picture_part, pictures), TextPart(question)))


def picture_part(picture: Picture) -> ImagePart | ImageUrl:
    """A picture in any accepted form as a message part. Raises RequestError for a file that cannot be read."""
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
    """Whether a text is a picture's URL rather than a path."""
    return text[:8].lower().startswith(("http://", "https://", "data:"))


def read_picture(path: Path) -> bytes:
    """The bytes of a file. Raises RequestError naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", param="image", code="unreadable_file") from error


def media_type(data: bytes) -> str | None:
    """The media type of a file that begins with these bytes, if it is a picture of a known kind."""
    return next((kind for at, mark, kind in _SIGNATURES if data.startswith(mark, at)), None)


def data_url(data: bytes) -> str:
    """The picture as a data URL. The service decides about unknown kinds."""
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
        # A mode that PNG does not support, such as CMYK.
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
