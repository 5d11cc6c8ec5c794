"""Pictures for loads: new ones each time, the same for the same seed, of every size and format."""

import io

from PIL import Image

from benchmarks.service.pictures import FORMATS, SIDES, PictureMaker


def test_pictures_are_new_and_of_every_size_and_format() -> None:
    maker, again = PictureMaker("seed"), PictureMaker("seed")
    made = [maker.make() for _ in range(60)]
    assert [each.data for each in made[:5]] == [again.make().data for _ in range(5)]
    assert len({each.data for each in made}) == len(made)
    opened = [Image.open(io.BytesIO(each.data)) for each in made]
    assert {image.format for image in opened} == {each.format for each in made} == set(FORMATS)
    sides = {max(image.size) for image in opened}
    assert sides <= SIDES.keys()
    assert len(sides) >= 5


def test_pictures_still_differ_at_the_models_resolution() -> None:
    """Scaled down to the default model's resolution."""
    maker = PictureMaker(1)
    seen = set()
    for _ in range(40):
        image = Image.open(io.BytesIO(maker.make().data)).convert("RGB").resize((192, 192))
        seen.add(image.tobytes())
    assert len(seen) == 40


def test_a_picture_of_a_given_side() -> None:
    assert max(Image.open(io.BytesIO(PictureMaker(1).make(side=64).data)).size) == 64
