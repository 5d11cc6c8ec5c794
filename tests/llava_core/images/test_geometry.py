"""How many tokens a picture becomes, against the towers' published numbers and against what the tower returns."""

import pytest

from llava_core.config import SelectFeature, VisionConfig
from llava_core.images.geometry import num_image_tokens


@pytest.mark.parametrize(
    ("image_size", "patch_size", "select", "expected"),
    [
        (336, 14, "patch", 576),
        (336, 14, "cls_patch", 577),
        (224, 14, "patch", 256),
        (224, 32, "patch", 49),
        (14, 14, "patch", 1),
    ],
)
def test_one_token_per_patch_and_one_for_the_class(
    image_size: int, patch_size: int, select: SelectFeature, expected: int
) -> None:
    vision = VisionConfig(image_size, patch_size, 8, -2, select, {})
    assert num_image_tokens(vision) == expected
