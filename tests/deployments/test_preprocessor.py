"""The preprocessing stage: its results and its rejections, side by side."""

import asyncio
from pathlib import Path

import pytest

from deployments.messages import Prepared, Rejected
from deployments.preprocessor import Preprocessor
from llava_core.checkpoints.describe import load_preparer
from llava_core.errors import ImageError
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import plain


@pytest.fixture
def preprocessor(tiny_checkpoint: Path) -> Preprocessor:
    return Preprocessor(load_preparer(tiny_checkpoint))


def _request(*parts: TextPart | ImagePart) -> GenerationRequest:
    return GenerationRequest("id", (Message("user", parts),), SamplingParams())


def test_a_request_becomes_ids_and_tiles(preprocessor: Preprocessor) -> None:
    prepared = asyncio.run(preprocessor.prepare(_request(ImagePart(plain()), TextPart("hi"))))
    assert isinstance(prepared, Prepared)
    assert len(prepared.request.images) == 1
    assert set(prepared.elapsed.stage_ms) == {"preprocess"}


def test_a_bad_picture_is_a_value_not_an_exception(preprocessor: Preprocessor) -> None:
    rejected = asyncio.run(preprocessor.prepare(_request(ImagePart(b"no picture"))))
    assert isinstance(rejected, Rejected)
    assert isinstance(rejected.error, ImageError)
    assert rejected.error.param == "messages[0].content[0].image_url"


def test_requests_are_prepared_side_by_side(preprocessor: Preprocessor) -> None:
    async def several() -> list[Prepared | Rejected]:
        await preprocessor.ping()
        return await asyncio.gather(*(preprocessor.prepare(_request(TextPart(str(index)))) for index in range(8)))

    prepared = asyncio.run(several())
    assert all(isinstance(each, Prepared) for each in prepared)
    assert len({each.request.prompt_ids for each in prepared if isinstance(each, Prepared)}) == 8
