"""Types at the API boundary: sampling parameters are validated, pictures counted, private data kept out of reprs."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from llava_core.types import (
    GenerationRequest,
    ImagePart,
    ImageUrl,
    Message,
    PreparedImage,
    PreparedRequest,
    SamplingParams,
    Size,
    TextPart,
)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature.*-0.1"),
        ({"temperature": 2.5}, "temperature.*2.5"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"top_p": 0.0}, "top_p.*0.0"),
        ({"top_p": 1.5}, "top_p.*1.5"),
        ({"top_k": -1}, "top_k.*-1"),
        ({"stop": ("a", "")}, "stop"),
    ],
)
def test_bad_sampling_values_are_refused_and_shown(values: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        SamplingParams(**values)


def test_the_extremes_of_sampling_are_allowed() -> None:
    SamplingParams(max_tokens=1, temperature=2.0, top_p=1e-9, top_k=0, stop=("x",))


def test_a_request_counts_pictures_over_all_messages() -> None:
    picture = ImagePart(b"x")
    messages = (
        Message("user", (picture, TextPart("a"), picture)),
        Message("assistant", (TextPart("b"),)),
        Message("user", (picture,)),
    )
    request = GenerationRequest("r", messages, SamplingParams())
    assert (request.num_images, request.has_addresses) == (3, False)
    with_address = (*messages[:2], Message("user", (ImageUrl("https://example.com/"), picture)))
    request = GenerationRequest("r", with_address, SamplingParams())
    assert (request.num_images, request.has_addresses) == (4, True)


def test_sizes_are_width_first() -> None:
    assert Size(3, 4).width == 3


def test_pictures_and_prompts_stay_out_of_reprs() -> None:
    secret = "s3cr3t-picture"
    image = PreparedImage("d", Size(1, 1), np.zeros((1, 1, 1, 3), np.uint8))
    assert secret not in repr(ImagePart(secret.encode()))
    assert secret not in repr(ImageUrl(secret))
    assert "array" not in repr(image)
    assert "123456" not in repr(PreparedRequest("r", (123456,), (image,), SamplingParams()))


def test_importing_types_and_errors_loads_nothing_heavy() -> None:
    code = (
        "import sys, llava_core, llava_core.types, llava_core.errors, llava_core.config;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'PIL', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
