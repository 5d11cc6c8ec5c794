"""A request's state: why it ends, its usage, which of its blocks can be shared, and the time of each stage."""

from itertools import pairwise
from typing import Any

import pytest

from llava_core.engine.prefix import ImageSpan, next_key
from llava_core.engine.request import RequestState
from llava_core.types import EngineRequest, SamplingParams, Size, Usage

IMAGE = ImageSpan(1, 3, "cat", Size(40, 30))
PROMPT = (1, -200, -200, 5, 6)


class Stopped:
    """A detokenizer reduced to its flag."""

    def __init__(self, *, is_stopped: bool) -> None:
        self.is_stopped = is_stopped


def make(
    written: list[int], *, score_from: int | None = None, max_tokens: int = 3, is_stopped: bool = False, **sampling: Any
) -> RequestState:
    request = EngineRequest("a", PROMPT, (), SamplingParams(max_tokens=3, **sampling), score_from=score_from)
    return RequestState(
        request=request,
        index=0,
        number=0,
        max_tokens=max_tokens,
        seed=0,
        images=(IMAGE,),
        detokenizer=Stopped(is_stopped=is_stopped),  # type: ignore[arg-type]
        tokens=[*PROMPT, *written],
    )


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (make([]), None),
        (make([7]), None),
        (make([7, 2]), "stop"),
        (make([7, 2], ignore_eos=True), None),
        (make([7, 8], stop_token_ids=(8,)), "stop"),
        (make([7, 8], stop_token_ids=(8,), ignore_eos=True), "stop"),
        (make([7, 8, 9]), "length"),
        (make([7, 8, 2]), "stop"),
        (make([7, 8, 9], is_stopped=True), "stop"),
        (make([7], is_stopped=True), "stop"),
        # Only scored: no token is generated.
        (make([], max_tokens=0, score_from=3), "length"),
    ],
)
def test_an_answer_ends_for_the_right_reason(state: RequestState, reason: str | None) -> None:
    assert state.finish_reason(frozenset({2})) == reason


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    assert make([]).finish_reason(frozenset({6})) is None


def test_usage_counts_prompt_answer_image_and_cached_tokens() -> None:
    state = make([7, 8])
    state.num_computed = 4
    state.started()
    assert state.usage() == Usage(5, 2, 2, 4)


def test_cached_tokens_are_those_found_the_first_time() -> None:
    state = make([])
    state.started()
    state.num_computed = 4
    state.started()
    assert state.usage().cached_tokens == 0


def test_lengths_follow_the_answer() -> None:
    state = make([])
    assert (state.num_prompt, state.num_output, state.num_pending, state.max_length) == (5, 0, 5, 8)
    state.num_computed = 5
    state.tokens += [7, 8]
    assert (state.num_prompt, state.num_output, state.num_pending, state.max_length) == (5, 2, 2, 8)
    assert state.output_ids == [7, 8]


def test_a_request_is_running_while_it_holds_blocks() -> None:
    state = make([])
    assert not state.is_running
    state.blocks = [0]
    assert state.is_running


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_written", [0, 1, 4])
@pytest.mark.parametrize("score_from", [None, 3, 4])
def test_shareable_blocks_end_before_the_first_token_with_wanted_logits(
    block_size: int, num_written: int, score_from: int | None
) -> None:
    state = make([7] * num_written, score_from=score_from)
    # The last token's logits give the next token; those of the token before score_from give the first log-probability.
    first_wanted = len(state.tokens) - 1 if score_from is None else score_from - 1
    fitting = [num for num in range(20) if num * block_size <= first_wanted]
    assert state.num_shareable(block_size) == max(fitting)
    assert len(list(state.prefix_keys(block_size))) == max(fitting)


def test_block_keys_cover_prompt_and_answer() -> None:
    state = make([])
    first = state.block_key(0, 2)
    assert first == next_key(b"", PROMPT, 0, [IMAGE], block_size=2)
    state.tokens += [7, 8, 9]
    keys = [state.block_key(index, 2) for index in range(4)]
    assert keys[0] == first
    for index, (previous, key) in enumerate(pairwise(keys), start=1):
        assert key == next_key(previous, state.tokens, 2 * index, [IMAGE], block_size=2)
    assert list(state.prefix_keys(2)) == keys[:3]


def test_stage_times_are_measured_once_and_add_up() -> None:
    state = make([])
    state.started()
    state.wrote()
    begun, ended = state.prefill_started, state.prefill_ended
    state.started()
    state.wrote()
    assert (state.prefill_started, state.prefill_ended) == (begun, ended)
    times = state.stage_ms()
    assert list(times) == ["queue", "prefill", "decode"]
    assert all(value >= 0 for value in times.values())
    assert times["queue"] == pytest.approx((begun - state.arrived) * 1e3)
    assert times["prefill"] == pytest.approx((ended - begun) * 1e3)


def test_a_scored_prompt_has_no_decode_time() -> None:
    state = make([], score_from=3, max_tokens=0)
    state.started()
    times = state.stage_ms()
    assert times["prefill"] >= 0
    assert times["decode"] == 0


def test_an_already_complete_answer_has_no_queue_or_prefill_time() -> None:
    state = make([7, 8, 9])
    state.skipped()
    assert (state.stage_ms()["queue"], state.stage_ms()["prefill"]) == (0, 0)
