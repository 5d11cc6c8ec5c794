"""Evaluation samples: reproducible, every kind equally often, pictures that decode."""

import pytest

from llava_core.images.loading import ImageLimits, decode_image
from llava_core.scenes.questions import MAKERS
from llava_core.scenes.samples import make_samples


def test_every_kind_occurs_equally_often() -> None:
    kinds = [sample.kind for sample in make_samples(27)]
    assert {kind: kinds.count(kind) for kind in MAKERS} == dict.fromkeys(MAKERS, 3)


def test_the_same_seed_makes_the_same_samples() -> None:
    assert make_samples(9) == make_samples(9)
    assert make_samples(9) != make_samples(9, seed=1)


def test_a_larger_set_starts_with_the_same_samples() -> None:
    assert make_samples(12)[:9] == make_samples(9)


@pytest.mark.parametrize(("image_format", "start"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8")])
def test_pictures_have_the_requested_format(image_format: str, start: bytes) -> None:
    for sample in make_samples(9, image_format="png" if image_format == "png" else "jpeg"):
        assert sample.image.startswith(start)
        picture = decode_image(sample.image, ImageLimits(), param="image").image
        assert 64 <= max(picture.size) <= 1500


def test_the_format_changes_only_the_bytes() -> None:
    one, other = make_samples(9), make_samples(9, image_format="jpeg")
    assert [(s.question, s.expected) for s in one] == [(s.question, s.expected) for s in other]
