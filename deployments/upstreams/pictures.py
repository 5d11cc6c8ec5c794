"""Pictures in formats that other engines can read: each is decoded once as a check, and converted to PNG if others
could not read it or would see something else, as with DICOM and 16-bit grey.

Runs in the stage that decodes pictures for our own models, too. Knows nothing about who reads them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from llava_core.client.messages import media_type
from llava_core.images.loading import ImageLimits, decode_image
from llava_core.types import GenerationRequest, ImagePart
from llava_core.views import ImageTransform

# Of the formats decoded here, those that every engine reads.
_READ_EVERYWHERE = {"image/png", "image/jpeg", "image/webp", "image/gif"}


@dataclass(frozen=True)
class PortableImage:
    """A picture in a web format, and how its stored values became the visible ones where they differ."""

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
    kind = media_type(part.data)
    if kind in _READ_EVERYWHERE and transform is None:
        # Unchanged: another encoding would be larger, or lose something.
        return PortableImage(kind, part.data)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return PortableImage("image/png", encoded.getvalue(), transform)
