"""Pictures for other servers: unchanged, or as PNG where other engines would not see the same as ours."""

import io

import numpy as np
import pytest
from PIL import Image

from deployments.upstreams.pictures import portable_images
from llava_core.errors import ImageError
from llava_core.images.loading import ImageLimits, decode_image
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from llava_core.views import DicomView
from tests.deployments.pictures import encode, plain, unusable
from tests.dicom_files import PLANTED, dicom

LIMITS = ImageLimits(max_pixels=400_000)


def _request(*parts: ImagePart | TextPart) -> GenerationRequest:
    return GenerationRequest("id", (Message("user", (TextPart("a"),)), Message("user", parts)), SamplingParams())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_that_every_engine_reads_are_passed_on_unchanged(kind: str) -> None:
    data = encode(Image.new("RGB", (30, 20), "red"), kind)
    [picture] = portable_images(_request(ImagePart(data)), LIMITS)
    assert (picture.media_type, picture.data, picture.transform) == (f"image/{kind.lower()}", data, None)


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_formats_that_some_engines_cannot_read_become_png(kind: str) -> None:
    image = Image.effect_noise((30, 20), 80).convert("RGB")
    [picture] = portable_images(_request(ImagePart(encode(image, kind))), LIMITS)
    assert picture.media_type == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.data))), np.asarray(image))


def test_deep_grey_and_dicom_are_rendered_as_for_our_models_with_transforms() -> None:
    deep = encode(Image.new("I;16", (20, 20), 40_000))
    file = dicom(np.arange(64, dtype=np.uint16).reshape(8, 8) * 50)
    view = DicomView(window=(1000.0, 500.0))
    pictures = portable_images(_request(ImagePart(deep), TextPart("and"), ImagePart(file, dicom=view)), LIMITS)
    for picture, data, seen in zip(pictures, (deep, file), (None, view), strict=True):
        expected, transform = decode_image(data, LIMITS, param="", dicom=seen)
        assert picture.media_type == "image/png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB")), np.asarray(expected))
        assert picture.transform == transform is not None
    assert PLANTED.encode() not in pictures[1].data


@pytest.mark.parametrize("kind", sorted(unusable()))
def test_an_undecodable_picture_is_refused_with_its_location(kind: str) -> None:
    with pytest.raises(ImageError) as raised:
        portable_images(_request(TextPart("look"), ImagePart(unusable()[kind])), LIMITS)
    assert raised.value.param == "messages[1].content[1].image_url"


def test_a_dicom_view_of_another_format_is_refused() -> None:
    with pytest.raises(ImageError, match="not a DICOM file"):
        portable_images(_request(ImagePart(plain(), dicom=DicomView(frame=2))), LIMITS)
