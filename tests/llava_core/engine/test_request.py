"""A request's state: why it ends, what it counts."""

from typing import Any

import pytest
import torch

from llava_core.engine.request import RequestState
from llava_core.types import EngineRequest, ImageFeatures, SamplingParams


class Stopped:
    """A detokenizer reduced to its flag."""

    def __init__(self, *, is_stopped: bool) -> None:
        self.is_stopped = is_stopped


def state(output_ids: list[int], *, stopped: bool = False, **sampling: Any) -> RequestState:
    request = EngineRequest("a", (1, -200, -200), (ImageFeatures("d", torch.zeros(9, 4)),), SamplingParams(**sampling))
    return RequestState(request, 3, Stopped(is_stopped=stopped), torch.Generator(), output_ids=output_ids)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (state([5]), None),
        (state([5, 2]), "stop"),
        (state([5, 2], ignore_eos=True), None),
        (state([5, 6, 7]), "length"),
        (state([5, 6, 2]), "stop"),
        (state([5], stopped=True), "stop"),
    ],
)
def test_a_request_ends_for_the_right_reason(made: RequestState, reason: str | None) -> None:
    assert made.finish_reason(frozenset({2})) == reason


def test_usage_counts_prompt_answer_and_image_tokens() -> None:
    usage = state([5, 6]).usage()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.image_tokens) == (3, 2, 2)
