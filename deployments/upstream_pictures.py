"""Pictures as engines that are not ours can read them: decoded once to see that they can be, and PNG where others would
not read them or see something else, such as DICOM and 16-bit grey.

Runs where pictures are decoded for our own models too. Knows nothing about who reads them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from llava_core.images.loading import ImageLimits, decode_image
from llava_core.types import GenerationRequest, ImagePart
from llava_core.views import ImageTransform

# What every engine reads, by how it begins.
_READ_EVERYWHERE = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
    b"GIF8": "image/gif",
}


@dataclass(frozen=True)
class PortableImage:
    """A picture in a format of the web's, and what became of its values where they are not what is seen."""

    media_type: str
    data: bytes = field(repr=False)
    transform: ImageTransform | None = None


def portable_images(request: GenerationRequest, limits: ImageLimits) -> tuple[PortableImage, ...]:
    """The request's pictures, in order. Raises ImageError for the first that cannot be decoded, naming its place."""
    return tuple(
        _portable(part, limits, f"messages[{index}].content[{position}].image_url")
        for index, message in enumerate(request.messages)
        for position, part in enumerate(message.parts)
        if isinstance(part, ImagePart)
    )


def _portable(part: ImagePart, limits: ImageLimits, param: str) -> PortableImage:
    image, transform = decode_image(part.data, limits, param=param, dicom=part.dicom)
    media_type = next((kind for begin, kind in _READ_EVERYWHERE.items() if part.data.startswith(begin)), None)
    if media_type is not None and transform is None:
        # As it came: another encoding would be larger, or lose something.
        return PortableImage(media_type, part.data)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return PortableImage("image/png", encoded.getvalue(), transform)
