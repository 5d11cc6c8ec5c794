"""What a request may hold, told before anything is decoded. Of conversations and texts test_prepare.py has more."""

import pytest

from llava_core.errors import RequestError
from llava_core.request_limits import RequestLimits, check_rendered, check_request, message_text
from llava_core.types import ImagePart, Message, RenderedRequest, SamplingParams, TextPart

LIMITS = RequestLimits(max_images=2, max_text=50, max_n=3)


def rendered(prompt: str, num_images: int, **sampling: int) -> RenderedRequest:
    return RenderedRequest("id", prompt, (ImagePart(b""),) * num_images, SamplingParams(**sampling))


def test_a_rendered_prompt_has_a_picture_for_each_place() -> None:
    for prompt, num_images in (("hi", 0), ("<image>\nhi", 1), ("a <image> b <image>", 2)):
        check_request(rendered(prompt, num_images), LIMITS, {"</s>", "#"})


def test_control_tokens_of_a_rendered_prompt_are_its_templates() -> None:
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
def test_what_is_wrong_with_a_rendered_prompt_is_named(prompt: str, num_images: int, param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_rendered(prompt, num_images, LIMITS)
    assert (caught.value.param, caught.value.message) == (param, message)


def test_answers_are_limited_whatever_is_asked() -> None:
    with pytest.raises(RequestError, match="n is 4; at most 3"):
        check_request(rendered("hi", 0, n=4), LIMITS, set())


def test_message_texts_keep_their_lines() -> None:
    assert message_text(Message("user", (TextPart("one"), ImagePart(b""), TextPart("two")))) == "one\ntwo"
