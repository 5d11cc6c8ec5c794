"""Two replicas of every stage: a picture's requests find its cached results, and answers do not depend on the replica.
A real Ray."""

import collections
import concurrent.futures
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.commands.top import Page
from deployments.metrics import CACHE_HITS, CACHE_MISSES, FINISHED, PREFIX_HIT_TOKENS, ROUTED, Metric
from llava_core.checkpoints.load import LoadOptions
from llava_core.inference import LocalModel
from llava_core.types import GenerationRequest, ImagePart, Message, SamplingParams, TextPart
from tests.deployments.pictures import plain
from tests.deployments.service import Running, content, messages, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

QUESTION = "What?"
MAX_TOKENS = 8
# That none of two replicas is preferred by any of them has a probability of 2 to the -15th.
PICTURES = [plain((15 * shade, 0, 0)) for shade in range(16)]
STAGES = ("Preprocessor", "VisionEncoder", "Generator")


@pytest.fixture(scope="module")
def service(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    stage = {"num_cpus": 0.05, "min_replicas": 2, "max_replicas": 2}
    compute = {**stage, "dtype": "float32", "threads": 1}
    folder = tmp_path_factory.mktemp("routing")
    with serving(tiny_checkpoint, folder, preprocessor=stage, vision_encoder=compute, generator=compute) as running:
        yield running


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> list[str]:
    """The answers about each picture of a model without caches."""
    model = LocalModel(tiny_checkpoint, options=LoadOptions(dtype="float32"), cache_bytes=0)

    def answer(picture: bytes) -> str:
        parts = (ImagePart(picture), TextPart(QUESTION))
        request = GenerationRequest("id", (Message("user", parts),), SamplingParams(max_tokens=MAX_TOKENS))
        return "".join(delta.text for delta in model.stream(request))

    return [answer(picture) for picture in PICTURES]


def _ask(service: Running, picture: bytes) -> Any:
    response = service.post(messages=messages(content(picture, QUESTION)), max_tokens=MAX_TOKENS)
    assert response.status_code == 200, response.text
    return response.json()


def _text(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


def _by_replica(page: Page, metric: Metric, **labels: str) -> dict[str, float]:
    found = collections.Counter[str]()
    for given, value in page.samples.get(metric.name, ()):
        if labels.items() <= given.items():
            found[given["replica"]] += int(value)
    return {replica: value for replica, value in found.items() if value}


def test_each_picture_is_encoded_once_and_pictures_are_spread(service: Running, expected: list[str]) -> None:
    """The first test of the file, because it counts from zero."""
    num_rounds = 4
    answers = [[_ask(service, picture) for picture in PICTURES] for _ in range(num_rounds)]
    assert all([_text(answer) for answer in each] == expected for each in answers)
    cached = [[answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in each] for each in answers]
    # Both replicas soon cache the prefix that all requests share; a picture is cached only where it has been before.
    again = [num_tokens > max(cached[0]) for each in cached[1:] for num_tokens in each]
    num_answers = num_rounds * len(PICTURES)

    def check(page: Page) -> None:
        assert page.total(FINISHED) == num_answers
        # A replica that does not tell its load within 0.1 s, which happens on a busy machine, is passed over.
        passed_over = {stage: page.total(ROUTED, target=stage, choice="fallback") for stage in STAGES}
        preferred = {stage: page.total(ROUTED, target=stage, choice="preferred") for stage in STAGES}
        # Half of them if the choice were random.
        assert min(preferred.values()) > 3 / 4 * num_answers
        assert [preferred[stage] + passed_over[stage] for stage in STAGES] == [num_answers] * len(STAGES)
        # In the first round nothing was cached, in the others everything.
        for stage, cache in (("Preprocessor", "tiles"), ("VisionEncoder", "features")):
            num_misses = page.total(CACHE_MISSES, cache=cache)
            assert len(PICTURES) <= num_misses <= len(PICTURES) + passed_over[stage]
            assert page.total(CACHE_HITS, cache=cache) == num_answers - num_misses
            assert len(_by_replica(page, CACHE_MISSES, cache=cache)) == 2, "both replicas have seen some"
        assert len(again) - sum(again) <= passed_over["Generator"]
        assert len(_by_replica(page, PREFIX_HIT_TOKENS)) == 2

    service.settled_metrics(check)


def test_a_popular_picture_keeps_both_replicas_busy(service: Running) -> None:
    before = _routed(service)
    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda _: _text(_ask(service, PICTURES[0])), range(64)))
    assert set(answers) == {answers[0]}
    until(lambda: (_routed(service) - before).total() == 64)
    change = _routed(service) - before
    assert change["preferred"] > 0
    assert change["fallback"] > 0


def _routed(service: Running) -> collections.Counter[str]:
    page = service.metrics()
    choices = ("preferred", "fallback", "keyless")
    return collections.Counter({each: int(page.total(ROUTED, target="Generator", choice=each)) for each in choices})


def _kill_one_of_two(service: Running, stage: str) -> None:
    os.kill(service.replicas(stage)[0], signal.SIGKILL)


def _await_two(service: Running, stage: str) -> None:
    def are_both_ready() -> bool:
        healthy = httpx.get(f"{service.url}/health", timeout=10).status_code == 200
        return healthy and len(service.replicas(stage)) == 2

    until(are_both_ready, deadline_s=120)


@pytest.mark.parametrize("stage", STAGES)
def test_pictures_of_a_killed_replica_are_answered_by_the_other(
    service: Running, expected: list[str], stage: str
) -> None:
    _await_two(service, stage)
    _kill_one_of_two(service, stage)
    # Some pictures preferred it, and no request waits until Serve has replaced it.
    assert [_text(_ask(service, picture)) for picture in PICTURES] == expected


def test_requests_on_a_killed_replica_are_retried_on_the_other(service: Running) -> None:
    _await_two(service, "VisionEncoder")
    new = [plain((0, 5 * shade, 0)) for shade in range(1, 49)]
    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        asked = [clients.submit(_ask, service, picture) for picture in new]
        asked[0].result(60)
        _kill_one_of_two(service, "VisionEncoder")
        answers = [_text(each.result(60)) for each in asked]
    assert answers == [_text(_ask(service, picture)) for picture in new]
