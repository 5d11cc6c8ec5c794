"""Example questions are about pictures that come with the package."""

from PIL import Image

from deployments.page.examples import EXAMPLES


def test_every_picture_exists_and_is_small() -> None:
    paths = [path for example in EXAMPLES for path in example.pictures]
    assert len(paths) >= 3
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
        assert path.stat().st_size < 50_000
