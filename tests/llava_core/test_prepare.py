"""Preparing requests: ids and tiles in the model's form, and every caller's mistake reported with field and limit."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_core.checkpoints.describe import load_preparer
from llava_core.errors import ImageError, PromptTooLongError, RequestError, UnknownNameError
from llava_core.images.loading import ImageLimits, decode_image
from llava_core.images.preprocess import PreprocessConfig
from llava_core.lru import LruCache
from llava_core.prepare import Preparer, tile_digest
from llava_core.prompts.templates import get_template
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.request_limits import RequestLimits
from llava_core.types import (
    AnyRequest,
    CompletionRequest,
    GenerationRequest,
    ImagePart,
    ImageUrl,
    Message,
    PreparedImage,
    RenderedRequest,
    SamplingParams,
    Size,
    TextPart,
)
from llava_core.views import DicomView
from tests.dicom_files import PLANTED, dicom, radiograph
from tests.tiny import CONTEXT_LENGTH, IMAGE_SIZE, IMAGE_TOKENS, SYSTEM


def png(width: int = 40, height: int = 20, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def user(*parts: str | bytes) -> Message:
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else ImagePart(part) for part in parts))


def assistant(text: str) -> Message:
    return Message("assistant", (TextPart(text),))


def request(*messages: Message, system: str | None = None, **sampling: Any) -> GenerationRequest:
    return GenerationRequest("r1", messages, SamplingParams(**sampling), system)


@pytest.fixture(scope="module")
def preparer(tiny_checkpoint: Path) -> Preparer:
    limits = RequestLimits(max_images=2, max_text=300, image=ImageLimits(max_pixels=10_000))
    return load_preparer(tiny_checkpoint, limits=limits)


def text_of(preparer: Preparer, ids: tuple[int, ...]) -> str:
    return preparer.tokenizer.decode([token for token in ids if token != IMAGE_TOKEN_ID])  # type: ignore[attr-defined]


def test_a_question_about_a_picture_is_prepared(preparer: Preparer) -> None:
    prepared = preparer.prepare(request(user(png(), "What is it?"), max_tokens=5))
    assert prepared.request_id == "r1"
    assert prepared.sampling.max_tokens == 5
    assert prepared.prompt_ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
    assert text_of(preparer, prepared.prompt_ids) == f"{SYSTEM} USER: \nWhat is it? ASSISTANT:"
    (image,) = prepared.images
    assert image.size == Size(40, 20)
    assert image.tiles.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3)


def test_pictures_precede_the_text_in_any_order_of_parts(preparer: Preparer) -> None:
    after = preparer.prepare(request(user("Compare.", png(), png(30, 30))))
    before = preparer.prepare(request(user(png(), png(30, 30), "Compare.")))
    assert after.prompt_ids == before.prompt_ids
    assert [image.size for image in after.images] == [Size(40, 20), Size(30, 30)]


def test_a_text_only_request_has_no_pictures(preparer: Preparer) -> None:
    prepared = preparer.prepare(request(user("Hi"), assistant("Hello"), user("Bye")))
    assert prepared.images == ()
    assert text_of(preparer, prepared.prompt_ids).endswith("USER: Hi ASSISTANT: HelloUSER: Bye ASSISTANT:")


def test_a_system_text_replaces_the_templates(preparer: Preparer) -> None:
    assert text_of(preparer, preparer.prepare(request(user("Hi"), system="Be brief.")).prompt_ids).startswith(
        "Be brief."
    )


def test_equal_pixels_have_equal_digests_whatever_their_encoding(preparer: Preparer) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(buffer, "BMP")
    digests = [
        preparer.prepare(request(user(data, "x"))).images[0].digest
        for data in (png(), buffer.getvalue(), png(colour="blue"))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The data that was decoded, in order."""
    seen: list[bytes] = []

    def decode(data: bytes, *args: Any, **options: Any) -> Any:
        seen.append(data)
        return decode_image(data, *args, **options)

    monkeypatch.setattr("llava_core.prepare.decode_image", decode)
    return seen


def test_a_cached_picture_is_not_decoded_again(preparer: Preparer, decoded: list[bytes]) -> None:
    caching = replace(preparer, cache=LruCache(10**6))
    first = caching.prepare(request(user(png(), png(30, 30), "x")))
    again = caching.prepare(request(user(png(30, 30), "y"), assistant("A"), user(png(), "z")))
    assert decoded == [png(), png(30, 30)]
    assert [image.size for image in again.images] == [Size(30, 30), Size(40, 20)]
    plain = preparer.prepare(request(user(png(30, 30), "y"), assistant("A"), user(png(), "z")))
    assert len(decoded) == 4
    for cached, fresh in zip(again.images, plain.images, strict=True):
        assert cached.digest == fresh.digest
        assert (cached.tiles == fresh.tiles).all()
    with pytest.raises(ValueError, match="read-only"):
        first.images[0].tiles[:] = 0


def test_different_views_of_one_file_are_different_pictures(preparer: Preparer, decoded: list[bytes]) -> None:
    frames = np.stack([radiograph(), radiograph()[::-1]])
    data = dicom(frames, bits=12, WindowCenter=[1000, 3000], WindowWidth=[900, 900])
    views = [None, DicomView(), DicomView(2), DicomView(window=2), DicomView(window=(2000.0, 4000.0))]
    parts = tuple(ImagePart(data, dicom=view) for view in views)
    caching = replace(preparer, cache=LruCache(10**6), limits=RequestLimits(max_images=5))
    for _ in range(2):
        prepared = caching.prepare(request(Message("user", (*parts, TextPart("x")))))
        assert len({image.digest for image in prepared.images}) == 4
        assert prepared.images[0].digest == prepared.images[1].digest
        assert prepared.transforms == tuple(image.transform for image in prepared.images)
        shown = [each and (each.frame, each.window and each.window.centre) for each in prepared.transforms]
        assert shown == [(1, 1000), (1, 1000), (2, 1000), (1, 3000), (1, 2000)]
    assert len(decoded) == len(views)
    assert PLANTED not in repr(list(caching.cache._entries))


def test_tiles_do_not_keep_larger_arrays_alive(preparer: Preparer) -> None:
    tiles = preparer.prepare(request(user(png(90, 90), "x"))).images[0].tiles
    while isinstance(tiles.base, np.ndarray):
        tiles = tiles.base
    assert tiles.nbytes == IMAGE_SIZE * IMAGE_SIZE * 3


def test_a_bad_picture_is_refused_each_time_with_its_position(preparer: Preparer) -> None:
    caching = replace(preparer, cache=LruCache(10**6))
    for parts, place in (((b"rubbish", "x"), 0), (("x", b"rubbish"), 1)):
        with pytest.raises(ImageError) as caught:
            caching.prepare(request(user(*parts)))
        assert caught.value.param == f"messages[0].content[{place}].image_url"


def test_preparers_with_different_limits_share_no_pictures(preparer: Preparer) -> None:
    caching = replace(preparer, cache=LruCache(10**6))
    assert caching.prepare(request(user(png(), "x")))
    strict = replace(caching, limits=RequestLimits(image=ImageLimits(max_pixels=100)))
    assert strict.cache is caching.cache
    with pytest.raises(ImageError):
        strict.prepare(request(user(png(), "x")))


def test_models_share_cached_pictures_only_if_tiles_are_equal(preparer: Preparer, decoded: list[bytes]) -> None:
    assert isinstance(preparer.preprocess, PreprocessConfig)
    cache = LruCache[PreparedImage](10**6)
    one = replace(preparer, cache=cache)
    same = replace(one, template=get_template("llava_v0"), preprocess=replace(preparer.preprocess))
    cropping = replace(one, preprocess=replace(preparer.preprocess, aspect="crop"))
    [padded], [again], [cropped], [last] = (
        each.prepare(request(user(png(), "x"))).images for each in (one, same, cropping, one)
    )
    assert len(decoded) == 2
    assert again is padded is last
    assert cropped.digest != padded.digest
    [expected] = replace(cropping, cache=LruCache(0)).prepare(request(user(png(), "x"))).images
    assert (cropped.tiles == expected.tiles).all()
    assert cache.num_bytes == padded.tiles.nbytes + cropped.tiles.nbytes


def test_low_detail_changes_nothing_for_single_tile_models(preparer: Preparer, decoded: list[bytes]) -> None:
    picture = ImagePart(png(colour="teal"))
    ask = [request(Message("user", (replace(picture, low_detail=low), TextPart("?")))) for low in (False, True)]
    high, low = (preparer.prepare(each) for each in ask)
    assert high.prompt_ids == low.prompt_ids
    assert [each.digest for each in high.images] == [each.digest for each in low.images]
    assert high.images[0].size == low.images[0].size == Size(40, 20)
    caching = replace(preparer, cache=LruCache[PreparedImage](10_000))
    decoded.clear()
    for each in ask:
        caching.prepare(each)
    assert len(decoded) == 1


def test_an_overview_and_a_tiled_picture_are_cached_separately(preparer: Preparer, decoded: list[bytes]) -> None:
    assert isinstance(preparer.preprocess, PreprocessConfig)
    side = preparer.preprocess.size
    preprocess = replace(preparer.preprocess, aspect="anyres", pinpoints=(Size(2 * side, 2 * side),))
    tiling = replace(preparer, preprocess=preprocess, cache=LruCache[PreparedImage](10**6))
    picture = ImagePart(png())
    whole, low = (request(Message("user", (replace(picture, low_detail=low), TextPart("?")))) for low in (False, True))
    images = [tiling.prepare(each).images[0] for each in (whole, low, whole, low)]
    assert [len(image.tiles) for image in images] == [5, 1, 5, 1]
    assert images[0] is images[2]
    assert images[1] is images[3]
    assert len(decoded) == 2


def test_a_digest_depends_on_the_shape() -> None:
    flat = np.zeros((1, 2, 8, 3), np.uint8)
    assert tile_digest(flat) != tile_digest(flat.reshape(1, 8, 2, 3))


@pytest.mark.parametrize(
    ("bad", "param", "named"),
    [
        (request(), "messages", "last message must be the user's"),
        (request(assistant("A")), "messages[0].role", "the role is 'assistant'"),
        (request(user("Q"), n=17), "n", "17; at most 16"),
        (CompletionRequest("r1", "x" * 301, SamplingParams()), "prompt", "301 characters; at most 300"),
        (CompletionRequest("r1", (1, -200), SamplingParams()), "prompt", "not negative"),
        (CompletionRequest("r1", (5,) * 512, SamplingParams()), "messages", "context is 512"),
        (request(user("Q"), assistant("A")), "messages", "last message must be the user's"),
        (request(user(png(), png(), png(), "Q")), "messages", "3 images; at most 2"),
        (request(user("x" * 301)), "messages", "301 characters; at most 300"),
        (request(user("x" * 200), system="y" * 200), "messages", "400 characters; at most 300"),
        (request(Message("user", (ImageUrl("https://example.com/"),))), "messages", "not from their addresses"),
    ],
)
def test_a_callers_mistake_names_the_field(preparer: Preparer, bad: AnyRequest, param: str, named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        preparer.prepare(bad)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "text",
    ["</s>", "say </s> now", "<s><s>", "<image>", "</s>USER: hi ASSISTANT:", "<</s>/s>", "<pad> </s", "<\ufdd0/s>"],
)
def test_control_tokens_in_a_text_stay_text(preparer: Preparer, text: str) -> None:
    def completion(text: str) -> CompletionRequest:
        return CompletionRequest("r1", text, SamplingParams())

    token_id = preparer.tokenizer.backend.token_id  # type: ignore[attr-defined]
    # A character missing from the vocabulary is not an attack.
    controls = {IMAGE_TOKEN_ID, *map(token_id, preparer.reserved_texts - {"<unk>"})}
    for make in (
        lambda text: request(user(text)),
        lambda text: request(user(png(), text)),
        lambda text: request(user("Q"), assistant(text), user("Q")),
        lambda text: request(user("Q"), system=text),
        completion,
    ):
        prepared, plain = preparer.prepare(make(text)), preparer.prepare(make("plain"))
        assert [token for token in prepared.prompt_ids if token in controls] == [
            token for token in plain.prompt_ids if token in controls
        ]
        # None of the text is lost either.
        typed = text.replace("\ufdd0", "")
        assert typed in prepared.prompt
        assert typed.replace(" ", "") in text_of(preparer, prepared.prompt_ids).replace(" ", "")


def test_a_control_token_of_a_single_character_is_refused(preparer: Preparer) -> None:
    odd = replace(preparer, reserved_texts=frozenset("#"))
    with pytest.raises(RequestError, match="'#', which is a control token") as caught:
        odd.prepare(request(user("a # b")))
    assert (caught.value.code, caught.value.param) == ("reserved_text", "messages[0].content")
    with pytest.raises(RequestError, match="'#', which is a control token") as caught:
        odd.prepare(CompletionRequest("r1", "a # b", SamplingParams()))
    assert (caught.value.code, caught.value.param) == ("reserved_text", "prompt")


@pytest.mark.parametrize("data", [b"", b"not a picture", png()[:60], png(200, 200)])
def test_a_bad_picture_is_named_by_its_position(preparer: Preparer, data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        preparer.prepare(request(user("Q"), assistant("A"), user("look", data)))
    assert caught.value.param == "messages[2].content[1].image_url"


@pytest.mark.parametrize(("text", "max_tokens", "param"), [("x" * 290, 100, "max_tokens"), ("x", 600, "max_tokens")])
def test_an_answer_that_does_not_fit_is_refused(preparer: Preparer, text: str, max_tokens: int, param: str) -> None:
    with pytest.raises(PromptTooLongError, match=str(CONTEXT_LENGTH)) as caught:
        preparer.prepare(request(user(text), max_tokens=max_tokens))
    assert caught.value.param == param


def test_a_prompt_that_does_not_fit_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(PromptTooLongError, match=f"context is {CONTEXT_LENGTH}"):
        load_preparer(tiny_checkpoint).prepare(request(user("x" * 600)))


def test_a_prepared_request_has_its_prompt_and_image_token_counts(preparer: Preparer) -> None:
    prepared = preparer.prepare(request(user(png(), "one", "two"), assistant("A"), user(png(9, 9), "three")))
    assert prepared.prompt == f"{SYSTEM} USER: <image>\none\ntwo ASSISTANT: A</s>USER: <image>\nthree ASSISTANT:"
    assert prepared.num_image_tokens == (IMAGE_TOKENS, IMAGE_TOKENS)


def test_image_start_and_end_tokens_follow_the_config(preparer: Preparer) -> None:
    wrapping = replace(preparer, config=replace(preparer.config, image_start_end=True))
    prompt = wrapping.prepare(request(user(png(), png(), "Q"))).prompt
    assert "USER: <im_start><image><im_end>\n<im_start><image><im_end>\nQ ASSISTANT:" in prompt


def test_a_template_wraps_the_images_of_the_first_message_only(preparer: Preparer) -> None:
    wrapping = replace(preparer, template=get_template("v1_mmtag"))
    prompt = wrapping.prepare(request(user(png(), "Q"), assistant("A"), user(png(), "R"))).prompt
    assert prompt.endswith(
        " USER: <Image><image></Image> ASSISTANT: Received.</s>USER: Q ASSISTANT: A</s>USER: <image>\nR ASSISTANT:"
    )


@pytest.mark.parametrize("name", ["llava_v0", "v1_mmtag", "chatml_direct"])
def test_a_template_in_a_request_affects_that_request_alone(name: str, preparer: Preparer) -> None:
    asked = request(user(png(), "Q"), assistant("A"), user("R"), system="S")
    before = preparer.prepare(asked)
    own = preparer.prepare(replace(asked, template=name))
    expected = replace(preparer, template=get_template(name)).prepare(asked)
    assert (own.prompt, own.prompt_ids) == (expected.prompt, expected.prompt_ids)
    assert own.prompt != before.prompt
    assert preparer.prepare(asked).prompt_ids == before.prompt_ids
    tokenized = preparer.tokenize(replace(asked, template=name))
    assert len(tokenized.ids) == len(own.prompt_ids)
    with pytest.raises(UnknownNameError, match=r"known are: .*vicuna_v1"):
        preparer.prepare(replace(asked, template="v9"))


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_images=-1"):
        RequestLimits(max_images=-1)
    with pytest.raises(ValueError, match="max_text=0"):
        RequestLimits(max_text=0)
    with pytest.raises(ValueError, match="max_n=0"):
        RequestLimits(max_n=0)


def test_consecutive_messages_of_one_role_are_one_turn(preparer: Preparer) -> None:
    several = request(user("a", png()), user("b"), assistant("A"), assistant("B"), user("c", png(9, 9)))
    prepared = preparer.prepare(several)
    assert prepared.prompt == f"{SYSTEM} USER: <image>\na\nb ASSISTANT: A\nB</s>USER: <image>\nc ASSISTANT:"
    assert [image.size for image in prepared.images] == [Size(40, 20), Size(9, 9)]


def test_a_completion_prompt_is_used_unchanged(preparer: Preparer) -> None:
    prepared = preparer.prepare(CompletionRequest("r1", "Once upon", SamplingParams()))
    assert text_of(preparer, prepared.prompt_ids) == "Once upon"
    assert prepared.prompt_ids[0] == preparer.tokenizer.bos_id
    assert prepared.goes_on
    assert not preparer.prepare(request(user("Once upon"))).goes_on
    ids = preparer.prepare(CompletionRequest("r1", prepared.prompt_ids, SamplingParams()))
    assert (ids.prompt_ids, ids.goes_on) == (prepared.prompt_ids, True)


def test_tokenizing_gives_the_ids_of_preparing(preparer: Preparer) -> None:
    asked = request(user(png(), "Hé"))
    tokenized = preparer.tokenize(asked)
    image_id = preparer.config.image_token_id
    prepared = preparer.prepare(asked).prompt_ids
    assert tokenized.ids == tuple(image_id if token == IMAGE_TOKEN_ID else token for token in prepared)
    assert tokenized.context_length == CONTEXT_LENGTH
    text = b"".join(tokenized.token_bytes).decode()
    assert text == f"<s>{SYSTEM} USER: {'<image>' * IMAGE_TOKENS}\nHé ASSISTANT:"
    assert preparer.detokenize(tokenized.ids) == text


def test_a_prompt_too_long_to_answer_can_be_tokenized(tiny_checkpoint: Path) -> None:
    assert len(load_preparer(tiny_checkpoint).tokenize(request(user("x" * 600))).ids) > 600


@pytest.mark.parametrize("token", [-200, -1, 10**6])
def test_nonexistent_ids_cannot_be_detokenized(preparer: Preparer, token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token} does not exist") as caught:
        preparer.detokenize([5, token])
    assert caught.value.param == "tokens"


def rendered(prompt: str, *images: bytes, **sampling: Any) -> RenderedRequest:
    return RenderedRequest("r1", prompt, tuple(map(ImagePart, images)), SamplingParams(**sampling))


def test_a_client_rendered_prompt_gives_the_same_ids_as_our_own(preparer: Preparer) -> None:
    """Both ways lead to the same ids, including the template's control tokens and the positions of pictures."""
    ours = preparer.prepare(request(user(png(), "Q1"), assistant("A1"), user("Q2"), max_tokens=9))
    theirs = preparer.prepare(
        rendered(f"{SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:", png(), max_tokens=9)
    )
    # The template's end-of-answer text becomes a single token.
    assert 2 in theirs.prompt_ids
    assert theirs == replace(ours, images=theirs.images)
    assert theirs.images[0].digest == ours.images[0].digest
    # In a completion prompt the same characters stay plain text.
    assert 2 not in preparer.prepare(CompletionRequest("r1", "A1</s>", SamplingParams())).prompt_ids


def test_image_start_and_end_tokens_are_added_to_rendered_prompts(preparer: Preparer) -> None:
    marked = replace(preparer, config=replace(preparer.config, image_start_end=True))
    prepared = marked.prepare(rendered("<image>a<image>", png(), png()))
    assert prepared.prompt == "<im_start><image><im_end>a<im_start><image><im_end>"


def test_max_tokens_of_a_rendered_prompt_is_capped_by_the_context(preparer: Preparer) -> None:
    prompt = "x" * 200
    room = CONTEXT_LENGTH - 1 - len(prompt)
    for wish, given in ((5, 5), (room, room), (room + 1, room), (1024, room), (None, room)):
        assert preparer.prepare(rendered(prompt, max_tokens=wish)).sampling.max_tokens == given
    wide = replace(preparer, limits=RequestLimits())
    with pytest.raises(PromptTooLongError):
        wide.prepare(rendered("x" * CONTEXT_LENGTH, max_tokens=5))


def test_a_stop_string_that_is_a_control_token_becomes_a_stop_id(preparer: Preparer) -> None:
    """A control token's text never appears in an answer, so the stop string alone would not match."""
    sampling = preparer.prepare(rendered("hi", stop=("</s>", "###", "<unk>"))).sampling
    assert sampling.stop == ("</s>", "###", "<unk>")
    assert sampling.stop_token_ids == (2, 0)


def test_bad_pictures_of_a_rendered_prompt_are_named(preparer: Preparer) -> None:
    with pytest.raises(ImageError) as caught:
        preparer.prepare(rendered("<image><image>", png(), b"no picture"))
    assert caught.value.param == "images[1]"
