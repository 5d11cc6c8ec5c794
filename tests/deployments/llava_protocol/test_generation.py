"""Bodies of the protocol: as lenient as the reference, with its defaults and caps, without its defects."""

import base64
import json
from typing import Any

import pytest

from deployments.llava_protocol.generation import Echo, LegacyRequest, read_generation
from llava_core.errors import RequestError
from llava_core.images.loading import ImageLimits
from llava_core.request_limits import RequestLimits
from llava_core.types import RenderedRequest
from tests.deployments.pictures import data_url, plain

LIMITS = RequestLimits(max_images=2, max_text=200, image=ImageLimits(max_bytes=5000))


def read(**body: Any) -> LegacyRequest:
    return read_generation(json.dumps({"prompt": "USER: hi ASSISTANT:", **body}).encode(), "id", LIMITS)


def generation(**body: Any) -> RenderedRequest:
    request = read(**body).generation
    assert request is not None
    return request


def test_defaults_are_those_of_the_reference() -> None:
    request = generation()
    assert (request.request_id, request.prompt, request.images) == ("id", "USER: hi ASSISTANT:", ())
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 256, ())


@pytest.mark.parametrize("field", ["model", "images", "temperature", "top_p", "max_new_tokens", "stop"])
def test_null_means_the_default(field: str) -> None:
    assert generation(**{field: None}) == generation()


def test_numbers_may_be_strings() -> None:
    sampling = generation(temperature="0.5", top_p="0.9", max_new_tokens="12").sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 12)


def test_unknown_fields_are_ignored() -> None:
    given = {"frequency_penalty": 1.5, "presence_penalty": 2, "repetition_penalty": "x", "n": 7, "response_format": {}}
    assert generation(**given) == generation()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0}, (0.0, 1.0)),
        ({"temperature": 0.001, "top_p": 0.5}, (0.0, 1.0)),
        ({"temperature": -1}, (0.0, 1.0)),
        ({"temperature": 0.002, "top_p": 0.5}, (0.002, 0.5)),
        # The page's slider can be set to this.
        ({"temperature": 1, "top_p": 0}, (0.0, 1.0)),
    ],
)
def test_sampling_is_enabled_under_the_same_conditions_as_in_the_reference(
    given: Any, expected: tuple[float, float]
) -> None:
    sampling = generation(**given).sampling
    assert (sampling.temperature, sampling.top_p) == expected


@pytest.mark.parametrize(("given", "expected"), [(1, 1), (1024, 1024), (1025, 1024), (1536, 1024)])
def test_an_answer_has_at_most_1024_tokens(given: int, expected: int) -> None:
    assert generation(max_new_tokens=given).sampling.max_tokens == expected


@pytest.mark.parametrize("given", [0, -5])
def test_a_request_for_no_tokens_needs_no_generation(given: int) -> None:
    assert read(max_new_tokens=given).generation is None


@pytest.mark.parametrize(
    ("given", "stop", "trims"),
    [
        ("###", ("###",), ()),
        (["</s>", "###"], ("</s>", "###"), ()),
        ("", (), ()),
        (["", "###"], ("###",), ()),
        (" ", (), (" ",)),
        ("\n", (), ("\n",)),
    ],
)
def test_stop_strings_end_an_answer_but_whitespace_is_only_trimmed(given: Any, stop: tuple, trims: tuple) -> None:
    """With an empty stop string, the reference's answers were empty."""
    request = read(stop=given)
    assert request.generation is not None
    assert (request.generation.sampling.stop, request.echo.trims) == (stop, trims)


def test_a_frame_echoes_the_prompt_and_trims_the_answer() -> None:
    echo = Echo("USER: x ", (" ",))
    assert [echo.text(answer) for answer in ("", " ", "a ", "a  ", "a b")] == [
        "USER: x ",
        "USER: x ",
        "USER: x a",
        "USER: x a ",
        "USER: x a b",
    ]


def test_pictures_are_base64_with_or_without_a_data_url_prefix() -> None:
    picture = plain()
    bare = base64.b64encode(picture).decode()
    lines = base64.encodebytes(picture).decode()
    for image in (bare, data_url(picture), lines):
        request = read(prompt="<image>\nhi", images=[image])
        assert request.generation is not None
        assert [part.data for part in request.generation.images] == [picture]
        # The reference's workers do not understand the head of a data URL.
        assert request.forwarded["images"] == [bare]


def test_an_external_worker_gets_the_original_fields_and_always_a_stop() -> None:
    """Without a stop string the reference's worker fails; with an empty one its answers are empty."""
    forwarded = read(model="x", temperature="0.5", repetition_penalty=1.2, stop="").forwarded
    assert forwarded == {
        "model": "x",
        "prompt": "USER: hi ASSISTANT:",
        "temperature": 0.5,
        "repetition_penalty": 1.2,
        "images": [],
        "stop": "</s>",
    }
    assert read().forwarded["stop"] == "</s>"
    assert read(stop=" ").forwarded["stop"] == " "
    assert read(stop=["###", "x"]).forwarded["stop"] == "###"


@pytest.mark.parametrize(
    ("body", "param", "named"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": 1}, "prompt", "string"),
        ({"prompt": "x" * 201}, "prompt", "at most 200"),
        ({"prompt": "<image>"}, "images", "Number of images does not match number of <image> tokens in prompt"),
        ({"images": ["aGk="]}, "images", "Number of images does not match number of <image> tokens in prompt"),
        ({"prompt": "<image>" * 3, "images": ["aGk="] * 3}, "images", "at most 2"),
        ({"prompt": "<image>", "images": ["aGk"]}, "images[0]", "not valid base64"),
        ({"prompt": "<image>", "images": ["http://169.254.169.254/"]}, "images[0]", "not valid base64"),
        ({"prompt": "<image>", "images": ["data:"]}, None, ""),
        ({"prompt": "<image>", "images": ["A" * 8000]}, "images[0]", "at most 5000"),
        ({"images": "aGk="}, "images", "array"),
        ({"images": [1]}, "images[0]", "string"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens", "integer"),
        ({"max_new_tokens": 10**12}, "max_new_tokens", "less than"),
        ({"stop": 1}, "stop", "string or a list"),
        ({"stop": "x" * 257}, "stop", "256"),
        ({"stop": ["x"] * 5}, "stop", "at most 4"),
    ],
)
def test_a_clients_mistake_is_named(body: dict, param: str | None, named: str) -> None:
    if param is None:
        # Not a picture, which the stage that decodes it will report.
        assert generation(**body).images[0].data == b""
        return
    with pytest.raises(RequestError) as caught:
        read(**body)
    assert caught.value.param == param
    assert named in caught.value.message


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"prompt": "x"', b'{"prompt": "x", "temperature": NaN}'])
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_generation(body, "id", LIMITS)
