"""Pictures of every kind as parts of messages, and messages as OpenAI's JSON."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from deployments.openai_api.chat_request import read_chat_request
from llava_core.client.messages import data_url, media_type, message_json, picture_part, user_message
from llava_core.client.requests import chat_body
from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits
from llava_core.types import ImagePart, ImageUrl, Message, TextPart
from llava_core.views import DicomView
from tests.deployments.pictures import encode, plain, unusual


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, f"image/{kind.lower()}") for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")],
)
def test_formats_written_by_pillow_are_recognised(kind: str, name: str) -> None:
    data = encode(Image.new("RGB", (8, 8), "red"), kind)
    assert media_type(data) == name
    assert data_url(data) == f"data:{name};base64,{base64.b64encode(data).decode()}"


def test_unknown_formats_are_left_to_the_service() -> None:
    assert media_type(b"%PDF") is media_type(b"") is None
    assert data_url(b"%PDF").startswith("data:image/")
    assert media_type(b"\0" * 128 + b"DICM") == "application/dicom"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK", "I;16", "P", "1"])
def test_a_pillow_image_is_sent_losslessly(mode: str) -> None:
    image = Image.new("RGB", (5, 4), "red").convert(mode) if mode != "I;16" else Image.new("I;16", (5, 4), 40_000)
    part = picture_part(image)
    assert isinstance(part, ImagePart)
    with Image.open(io.BytesIO(part.data)) as read:
        assert read.format == "PNG"
        assert read.size == (5, 4)
        if mode != "CMYK":
            assert read.convert(mode).tobytes() == image.tobytes()


def test_addresses_are_distinguished_from_paths(tmp_path: Path) -> None:
    for address in ("http://a/b.png", "HTTPS://a/b.png", "data:image/png;base64,AAAA"):
        assert picture_part(address) == ImageUrl(address)
    with pytest.raises(RequestError, match=r"none\.png cannot be read"):
        picture_part(str(tmp_path / "none.png"))
    with pytest.raises(RequestError, match="cannot be read"):
        picture_part(tmp_path)


def test_arguments_of_wrong_type_raise_type_error() -> None:
    with pytest.raises(TypeError, match="not int"):
        picture_part(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="its own pictures"):
        user_message(Message("user", ()), [b"x"])


def test_a_text_only_message_has_plain_text_content() -> None:
    assert message_json(user_message("Hi")) == {"role": "user", "content": "Hi"}


def test_parts_keep_their_order() -> None:
    red = plain()
    message = Message("user", (TextPart("a"), ImagePart(red), TextPart("b"), ImageUrl("http://x")))
    assert message_json(message)["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": data_url(red)}},
        {"type": "text", "text": "b"},
        {"type": "image_url", "image_url": {"url": "http://x"}},
    ]


@pytest.mark.parametrize("picture", [ImagePart(plain()), ImageUrl("http://x/a.png")])
@pytest.mark.parametrize("detail", ["auto", "low"])
@pytest.mark.parametrize("view", [None, DicomView(), DicomView(3, 2), DicomView(window=(40.5, 400))])
def test_the_service_reads_the_picture_that_the_client_sent(
    picture: ImagePart | ImageUrl, detail: str, view: DicomView | None
) -> None:
    part = replace(picture, low_detail=detail == "low", dicom=view)
    message = user_message("What?", [part])
    assert message.parts == (part, TextPart("What?"))
    body = json.dumps(chat_body([message])).encode()
    assert read_chat_request(body, "1", RequestLimits()).generation.messages == (message,)


def test_unusual_pictures_are_recognised() -> None:
    assert all(media_type(data) for data in unusual().values())
