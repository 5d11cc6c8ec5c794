"""Stages that gain replicas under load, lose them afterwards, and are woken by a request. A real Ray."""

import concurrent.futures
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments.metrics import FINISHED, STARTUP
from tests.deployments.pictures import plain
from tests.deployments.service import Running, content, messages, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

DELAYS = {"look_back_s": 1, "upscale_delay_s": 1, "downscale_delay_s": 2, "downscale_to_zero_delay_s": 4}
STAGE = {"num_cpus": 0.05, "min_replicas": 0, "dtype": "float32", "threads": 1}
# On a busy machine.
DEADLINE_S = 150.0
NUM_CLIENTS, NUM_TOKENS = 6, 400


@pytest.fixture(scope="module")
def service(long_context: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(
        long_context,
        tmp_path_factory.mktemp("scaling"),
        engine={"max_running": 4},
        vision_encoder={**STAGE, "autoscaling": DELAYS},
        generator={**STAGE, "max_replicas": 2, "autoscaling": {**DELAYS, "target_slot_use": 0.25}},
    ) as running:
        yield running


def _ask(service: Running, number: int) -> httpx.Response:
    """Ask about a new picture, and read a stream that takes a while to its end."""
    picture = plain((number % 256, number // 256 % 256, 1))
    asked = messages(content(picture, "What?"))
    return service.post(messages=asked, max_tokens=NUM_TOKENS, ignore_eos=True, stream=True)


def _is_complete(response: httpx.Response) -> bool:
    return response.status_code == 200 and '"error"' not in response.text and response.text.endswith("data: [DONE]\n\n")


def _states(service: Running) -> dict[str, str]:
    response = httpx.get(f"{service.url}/health", timeout=10)
    assert response.status_code == 200, response.text
    return dict(response.json()["stages"])


def test_replicas_scale_up_and_down_with_load_and_no_request_fails(service: Running) -> None:
    """The service is ready once each stage has been seen to run."""
    assert len(service.replicas("Generator")) == 1
    # Generators take longer to start; meanwhile the encoder may have been removed again.
    assert len(service.replicas("VisionEncoder")) <= 1
    is_over, numbers = threading.Event(), itertools.count()
    answers: list[httpx.Response] = []

    def client() -> None:
        while not is_over.is_set():
            answers.append(_ask(service, next(numbers)))

    def several_have_answered_and_reported_their_start() -> bool:
        """Checked under load, because a replica's metrics disappear from the page with the replica."""
        samples = service.metrics().samples
        finished, started = samples.get(FINISHED.name, ()), samples.get(STARTUP.name, ())
        replicas = {labels["replica"] for labels, value in finished if labels["outcome"] == "finished" and value}
        phases = {labels["phase"] for labels, value in started if value > 0}
        # More than two if one was added, removed and added again.
        return len(replicas) >= 2 and phases == {"imports", "weights", "engine"}

    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as clients:
        running = [clients.submit(client) for _ in range(NUM_CLIENTS)]
        try:
            until(several_have_answered_and_reported_their_start, deadline_s=DEADLINE_S)
        finally:
            is_over.set()
        for each in running:
            each.result()
    assert all(map(_is_complete, answers)), [each.text for each in answers if not _is_complete(each)][:1]

    # Two busy replicas become none, which is not reported as a fault.
    until(lambda: not service.replicas("Generator") and not service.replicas("VisionEncoder"), deadline_s=DEADLINE_S)
    empty = {"preprocessor": "ok", "vision_encoder": "scaled_to_zero", "generator": "scaled_to_zero"}
    until(lambda: _states(service) == empty)

    # Several concurrent requests wait for the same first replica.
    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as clients:
        woken = [clients.submit(_ask, service, next(numbers)) for _ in range(NUM_CLIENTS)]
        # Stages that are still starting do not make the service unhealthy.
        while not all(each.done() for each in woken):
            _states(service)
            concurrent.futures.wait(woken, timeout=0.2)
    assert all(_is_complete(each.result()) for each in woken)
