"""Admission: bad requests are refused at no cost with the right kind of error; valid ones become states."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llava_core.checkpoints.tokenizer import load_tokenizer
from llava_core.engine.admission import Admission, image_spans
from llava_core.engine.engine import Engine
from llava_core.engine.prefix import ImageSpan
from llava_core.errors import EngineError, LlavaError, PromptTooLongError, RequestError
from llava_core.models.language import LanguageSide
from llava_core.prompts.tokenize import IMAGE_TOKEN_ID
from llava_core.types import BegunAnswer, EngineRequest, ImageFeatures, SamplingParams, Size
from tests.tiny import CONTEXT_LENGTH, VISION_HIDDEN

CAPACITY = 64
WORDS = [1, 5, 6, 7]


class Silent:
    """A tokenizer that decodes everything to nothing."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def picture(num_rows: int = 4, *, digest: str = "cat", size: Size | None = None) -> ImageFeatures:
    return ImageFeatures(digest, torch.ones(num_rows, VISION_HIDDEN), size)


def ask(
    prompt: Sequence[int] = WORDS,
    *features: ImageFeatures,
    score_from: int | None = None,
    begun: Sequence[BegunAnswer] = (),
    **sampling: Any,
) -> EngineRequest:
    params = SamplingParams(**{"max_tokens": 3, **sampling})
    return EngineRequest("a", prompt, features, params, begun=begun, score_from=score_from)


def images(*counts: int) -> list[int]:
    """Builds a prompt with this many placeholders per picture, with words around them."""
    return [1, *(token for count in counts for token in (*[IMAGE_TOKEN_ID] * count, 9))]


@pytest.fixture
def admission(language_side: LanguageSide) -> Admission:
    return Admission(language_side, Silent(), CAPACITY)


@pytest.fixture
def vocab_size(language_side: LanguageSide) -> int:
    return int(language_side.decoder.config.vocab_size)


@pytest.fixture
def tiled(language_side: LanguageSide) -> Admission:
    """Admission of a model that merges tiles: a picture of 56 x 28 pixels has an overview and two more tiles."""
    side = copy.copy(language_side)
    side.config = replace(language_side.config, pinpoints=(Size(56, 28),), merge_type="spatial")
    return Admission(side, Silent(), CAPACITY)


def refusal(admission: Admission, request: EngineRequest) -> LlavaError:
    """Returns the error; the next request is numbered as if this one had never come."""
    with pytest.raises(LlavaError) as caught:
        admission.admit(request)
    assert [state.number for state in admission.admit(ask())] == [0]
    return caught.value


@pytest.mark.parametrize(
    ("num_prompt", "options", "message"),
    [
        (CONTEXT_LENGTH, {}, f"has {CONTEXT_LENGTH} tokens.*context is {CONTEXT_LENGTH}"),
        (2 * CONTEXT_LENGTH, {"max_tokens": None}, f"has {2 * CONTEXT_LENGTH} tokens.*context is {CONTEXT_LENGTH}"),
        (4, {"max_tokens": 9999}, f"max_tokens is 9999.*prompt of 4 tokens.*context of {CONTEXT_LENGTH}"),
        (CAPACITY, {"max_tokens": None}, f"has {CAPACITY} tokens.*up to 1,.*holds {CAPACITY}.*cache_tokens"),
        (4, {"max_tokens": CAPACITY - 3}, f"has 4 tokens.*up to {CAPACITY - 3},.*holds {CAPACITY}"),
        (CAPACITY + 1, {"score_from": 2}, f"has {CAPACITY + 1} tokens.*up to 0,.*holds {CAPACITY}"),
        (CONTEXT_LENGTH + 1, {"score_from": 2}, f"context is {CONTEXT_LENGTH}"),
    ],
)
def test_too_long_requests_are_refused_with_all_numbers(
    admission: Admission, num_prompt: int, options: dict[str, Any], message: str
) -> None:
    error = refusal(admission, ask([5] * num_prompt, **options))
    assert isinstance(error, PromptTooLongError)
    assert error.code == "context_length_exceeded"
    with pytest.raises(PromptTooLongError, match=message):
        raise error


@pytest.mark.parametrize(
    ("num_prompt", "options", "max_tokens"),
    [
        (4, {"max_tokens": CAPACITY - 4}, CAPACITY - 4),
        # Without a length the answer gets all the room there is.
        (4, {"max_tokens": None}, CAPACITY - 4),
        (CAPACITY - 1, {"max_tokens": None}, 1),
        (CAPACITY, {"score_from": 2}, 0),
    ],
)
def test_a_request_that_just_fits_is_admitted(
    admission: Admission, num_prompt: int, options: dict[str, Any], max_tokens: int
) -> None:
    (state,) = admission.admit(ask([5] * num_prompt, **options))
    assert state.max_tokens == max_tokens


def test_with_a_large_cache_the_context_is_the_limit(language_side: LanguageSide) -> None:
    admission = Admission(language_side, Silent(), 10 * CONTEXT_LENGTH)
    (state,) = admission.admit(ask(max_tokens=None))
    assert state.max_tokens == CONTEXT_LENGTH - 4
    (scored,) = admission.admit(ask([5] * CONTEXT_LENGTH, score_from=1))
    assert scored.max_length == CONTEXT_LENGTH


@pytest.mark.parametrize("options", [{}, {"max_tokens": None}, {"score_from": 1}])
def test_an_empty_prompt_is_refused(admission: Admission, options: dict[str, Any]) -> None:
    error = refusal(admission, ask([], **options))
    assert isinstance(error, RequestError)
    assert "the prompt is empty" in str(error) or "score_from must lie between" in str(error)


@pytest.mark.parametrize("place", ["prompt", "output", "stop_token_ids", "logit_bias"])
@pytest.mark.parametrize("token", [-1, -199, -201, "vocab_size", 2**40])
def test_nonexistent_tokens_are_refused_everywhere(
    admission: Admission, vocab_size: int, place: str, token: int | str
) -> None:
    wrong = vocab_size if isinstance(token, str) else token
    request = {
        "prompt": ask([*WORDS, wrong]),
        "output": ask(begun=[BegunAnswer([wrong])]),
        "stop_token_ids": ask(stop_token_ids=(5, wrong)),
        "logit_bias": ask(logit_bias=((5, 1.0), (wrong, 1.0))),
    }[place]
    error = refusal(admission, request)
    assert isinstance(error, RequestError)
    assert str(error) == f"token {wrong} does not exist: the model knows 0 to {vocab_size - 1}"
    assert error.param == (place if place in ("stop_token_ids", "logit_bias") else "messages")


@pytest.mark.parametrize("place", ["stop_token_ids", "logit_bias"])
def test_the_image_placeholder_is_refused_in_sampling_options(admission: Admission, place: str) -> None:
    named: dict[str, Any] = {"stop_token_ids": (IMAGE_TOKEN_ID,), "logit_bias": ((IMAGE_TOKEN_ID, 1.0),)}
    assert isinstance(refusal(admission, ask(**{place: named[place]})), RequestError)


def test_the_first_and_last_token_are_accepted(admission: Admission, vocab_size: int) -> None:
    ends = (0, vocab_size - 1)
    assert admission.admit(
        ask(ends, begun=[BegunAnswer(ends)], stop_token_ids=ends, logit_bias=((0, 1.0), (ends[1], 1.0)))
    )


def with_rows(features: Tensor) -> EngineRequest:
    return ask(images(4), ImageFeatures("cat", features))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(4, VISION_HIDDEN + 1), rf"picture 1 .*\(4, {VISION_HIDDEN + 1}\)"),
        (torch.ones(4 * VISION_HIDDEN), rf"picture 1 .*\({4 * VISION_HIDDEN},\)"),
        (torch.ones(1, 4, VISION_HIDDEN), rf"picture 1 .*\(1, 4, {VISION_HIDDEN}\)"),
        (torch.tensor(1.0), r"picture 1 .*\(\)"),
        (torch.full((4, VISION_HIDDEN), torch.nan), "picture 1 .*not finite"),
        (torch.full((4, VISION_HIDDEN), -torch.inf), "picture 1 .*not finite"),
        (torch.full((4, VISION_HIDDEN), torch.inf, dtype=torch.float16), "picture 1 .*not finite"),
        (torch.ones(3, VISION_HIDDEN), "4 image placeholders but 3 feature rows"),
        (torch.ones(5, VISION_HIDDEN), "4 image placeholders but 5 feature rows"),
    ],
)
def test_features_of_wrong_shape_or_not_finite_are_refused(
    admission: Admission, features: Tensor, message: str
) -> None:
    error = refusal(admission, with_rows(features))
    assert isinstance(error, EngineError)
    with pytest.raises(EngineError, match=message):
        raise error


def test_a_single_non_finite_value_is_refused(admission: Admission) -> None:
    features = torch.ones(4, VISION_HIDDEN)
    features[3, -1] = torch.nan
    assert "not finite" in str(refusal(admission, with_rows(features)))


def test_the_error_names_the_picture(admission: Admission) -> None:
    wrong = ImageFeatures("dog", torch.full((4, VISION_HIDDEN), torch.nan))
    assert "picture 2" in str(refusal(admission, ask(images(4, 4), picture(), wrong)))


@pytest.mark.parametrize(
    ("prompt", "features", "message"),
    [
        (WORDS, (picture(),), "0 image placeholders but 4 feature rows"),
        (images(4), (), "4 image placeholders but 0 feature rows"),
        (images(4, 4), (picture(),), "8 image placeholders but 4 feature rows"),
        (images(2, 2), (picture(),), "4 placeholders of a picture are not in one piece"),
        (images(3, 5), (picture(4), picture(4)), "4 placeholders of a picture are not in one piece"),
        (images(4, 2, 2), (picture(), picture(digest="dog")), "4 placeholders of a picture are not in one piece"),
    ],
)
def test_placeholders_that_do_not_match_the_pictures_are_refused(
    admission: Admission, prompt: list[int], features: tuple[ImageFeatures, ...], message: str
) -> None:
    error = refusal(admission, ask(prompt, *features))
    assert isinstance(error, EngineError)
    assert message in str(error)


def test_a_tiled_picture_has_the_rows_of_its_merged_tiles(tiled: Admission) -> None:
    (state,) = tiled.admit(ask(images(12), picture(12, size=Size(56, 28))))
    assert state.images == (ImageSpan(1, 13, "cat", Size(56, 28)),)


def test_missing_tiles_are_refused(tiled: Admission) -> None:
    error = refusal(tiled, ask(images(12), picture(8, size=Size(56, 28))))
    assert isinstance(error, EngineError)
    assert "features of picture 1: a picture of" in str(error)
    assert "needs 12 feature rows, not 8" in str(error)


@pytest.mark.parametrize(
    ("prompt", "features", "score_from", "message"),
    [
        (WORDS, (), 0, "between 1 and 3, not 0"),
        (WORDS, (), -1, "between 1 and 3, not -1"),
        (WORDS, (), 4, "between 1 and 3, not 4"),
        ([5], (), 1, "between 1 and 0, not 1"),
        (images(4), (picture(),), 1, "pictures cannot be scored"),
        (images(4), (picture(),), 4, "pictures cannot be scored"),
        (images(4, 2), (picture(), picture(2)), 5, "pictures cannot be scored"),
    ],
)
def test_only_tokens_after_all_pictures_can_be_scored(
    admission: Admission, prompt: list[int], features: tuple[ImageFeatures, ...], score_from: int, message: str
) -> None:
    error = refusal(admission, ask(prompt, *features, score_from=score_from))
    assert isinstance(error, RequestError)
    assert message in str(error)


def test_the_first_token_after_a_picture_can_be_scored(admission: Admission) -> None:
    (state,) = admission.admit(ask(images(4), picture(), score_from=5))
    assert (state.max_tokens, state.num_pending) == (0, 6)


@pytest.mark.parametrize(
    ("begun", "options"),
    [
        ([BegunAnswer([8])], {"n": 2}),
        ([BegunAnswer([8])] * 2, {}),
        ([BegunAnswer([8])], {"score_from": 1}),
        ([BegunAnswer([8], is_over=True)] * 2, {"n": 2}),
    ],
)
def test_a_resumed_request_needs_all_answers_and_an_unfinished_one(
    admission: Admission, begun: list[BegunAnswer], options: dict[str, Any]
) -> None:
    error = refusal(admission, ask(begun=begun, **options))
    assert isinstance(error, RequestError)
    assert error.param == "n"


def test_each_answer_has_a_state_numbered_in_order_of_arrival(admission: Admission) -> None:
    states = [*admission.admit(ask(n=3)), *admission.admit(ask()), *admission.admit(ask(n=2))]
    assert [state.index for state in states] == [0, 1, 2, 0, 0, 1]
    assert [state.number for state in states] == list(range(6))
    assert len({id(state.tokens) for state in states}) == 6
    assert len({id(state.detokenizer) for state in states}) == 6


def test_answers_share_a_seed_but_unseeded_requests_do_not(admission: Admission) -> None:
    first, second = (admission.admit(ask(n=2)) for _ in range(2))
    assert first[0].seed == first[1].seed
    assert first[0].seed != second[0].seed
    assert [state.seed for state in admission.admit(ask(n=2, seed=0))] == [0, 0]


def test_a_begun_answer_resumes_after_its_tokens(admission: Admission) -> None:
    (state,) = admission.admit(ask(begun=[BegunAnswer((8, 9))]))
    assert (state.tokens, state.output_ids, state.num_computed) == ([*WORDS, 8, 9], [8, 9], 0)
    assert state.max_length == len(WORDS) + 3


def test_finished_answers_of_a_resumed_request_are_left_out(admission: Admission) -> None:
    begun = [BegunAnswer((8,)), BegunAnswer((8, 9), is_over=True), BegunAnswer()]
    states = admission.admit(ask(begun=begun, n=3, seed=4))
    assert [(state.index, state.output_ids, state.seed) for state in states] == [(0, [8], 4), (2, [], 4)]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    """Draws words and pictures in any order, also adjacent pictures; returns the prompt and the pictures' positions."""
    prompt: list[int] = []
    places: list[tuple[int, int]] = []
    for num_words, num_rows in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=4)):
        prompt += [7] * num_words
        places.append((len(prompt), len(prompt) + num_rows))
        prompt += [IMAGE_TOKEN_ID] * num_rows
    return [*prompt, *[7] * draw(st.integers(0, 2))], places


@given(made=prompts())
def test_spans_match_the_positions_of_the_pictures(made: tuple[list[int], list[tuple[int, int]]]) -> None:
    prompt, places = made
    features = [picture(digest=str(number), size=Size(number + 1, 9)) for number in range(len(places))]
    spans = image_spans(ask(prompt, *features), [stop - start for start, stop in places])
    assert [(span.start, span.stop) for span in spans] == places
    assert [(span.digest, span.size) for span in spans] == [(image.digest, image.size) for image in features]


BuildEngine = Callable[..., Engine]


def test_a_picture_without_rows_is_refused(build_engine: BuildEngine) -> None:
    empty = ImageFeatures("cat", torch.ones(0, VISION_HIDDEN))
    with pytest.raises(EngineError):
        build_engine().add_request(EngineRequest("a", [1, 5], [empty], SamplingParams(max_tokens=3)))


def test_placeholders_in_an_answer_are_refused(build_engine: BuildEngine) -> None:
    with pytest.raises(RequestError):
        build_engine().add_request(
            EngineRequest("a", [1, 5], (), SamplingParams(max_tokens=3), begun=[BegunAnswer([-200])])
        )


def test_the_error_gives_the_length_of_the_prompt(build_engine: BuildEngine) -> None:
    with pytest.raises(PromptTooLongError, match=f"has {CONTEXT_LENGTH + 1} tokens"):
        build_engine().add_request(EngineRequest("a", [5] * (CONTEXT_LENGTH + 1), (), SamplingParams(), score_from=2))


def test_tiles_without_a_size_are_refused_by_admission(language_side: LanguageSide, tiny_checkpoint: Path) -> None:
    side = copy.copy(language_side)
    side.config = replace(language_side.config, pinpoints=(Size(56, 28),), merge_type="spatial")
    admission = Admission(side, load_tokenizer(tiny_checkpoint), 64)
    image = ImageFeatures("cat", torch.ones(12, VISION_HIDDEN))
    with pytest.raises(LlavaError):
        admission.admit(EngineRequest("a", [1, *[-200] * 12, 5], [image], SamplingParams(max_tokens=3)))
