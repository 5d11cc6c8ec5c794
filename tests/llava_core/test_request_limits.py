"""Limits of a request, checked before anything is decoded; test_prepare.py tests conversations and texts further."""

import pytest

from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits, check_rendered, check_request, message_text
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    Message,
    RenderedRequest,
    SamplingParams,
    TextPart,
)

LIMITS = RequestLimits(max_images=2, max_text=50, max_n=3)


def rendered(prompt: str, num_images: int, **sampling: int) -> RenderedRequest:
    return RenderedRequest("id", prompt, (ImagePart(b""),) * num_images, SamplingParams(**sampling))


def test_a_rendered_prompt_needs_a_picture_per_placeholder() -> None:
    for prompt, num_images in (("hi", 0), ("<image>\nhi", 1), ("a <image> b <image>", 2)):
        check_request(rendered(prompt, num_images), LIMITS, {"</s>", "#"})


def test_control_tokens_are_allowed_in_a_rendered_prompt() -> None:
    check_request(rendered("<s>#hi</s>", 0), LIMITS, {"<s>", "</s>", "#"})


@pytest.mark.parametrize(
    ("prompt", "num_images", "param", "message"),
    [
        ("<image>", 0, "images", "Number of images does not match number of <image> tokens in prompt"),
        ("hi", 1, "images", "Number of images does not match number of <image> tokens in prompt"),
        ("<image>" * 3, 3, "images", "the request has 3 images; at most 2 are allowed"),
        ("x" * 51, 0, "prompt", "the prompt has 51 characters; at most 50 are allowed"),
    ],
)
def test_faults_of_a_rendered_prompt_name_the_field(prompt: str, num_images: int, param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_rendered(prompt, num_images, LIMITS)
    assert (caught.value.param, caught.value.message) == (param, message)


@pytest.mark.parametrize(
    "request_",
    [
        GenerationRequest("id", (Message("user", (TextPart("ab\ud83d"),)),), SamplingParams()),
        GenerationRequest("id", (Message("user", (TextPart("a"),)),), SamplingParams(), system="ab\ud83d"),
        CompletionRequest("id", "ab\ud83d", SamplingParams()),
        rendered("ab\ud83d", 0),
    ],
)
def test_half_a_surrogate_pair_is_refused(request_: AnyRequest) -> None:
    with pytest.raises(RequestError, match=r"half a surrogate pair \(U\+D83D, character 3\)"):
        check_request(request_, LIMITS, set())


def test_the_number_of_answers_is_limited() -> None:
    with pytest.raises(RequestError, match="n is 4; at most 3"):
        check_request(rendered("hi", 0, n=4), LIMITS, set())


def test_message_texts_are_joined_by_newlines() -> None:
    assert message_text(Message("user", (TextPart("one"), ImagePart(b""), TextPart("two")))) == "one\ntwo"
