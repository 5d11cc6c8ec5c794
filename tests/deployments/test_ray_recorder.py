"""Recorded values reach Ray, here a stand-in, correctly, and whatever fails to be read or sent costs nothing else."""

import threading
from collections.abc import Iterator

import pytest

from deployments import ray_recorder
from deployments.metrics import BLOCKS, ERRORS, PROMPT_TOKENS, RUNNING, STAGE_DURATION, STEPS, Metric, Reading
from deployments.ray_recorder import RayRecorder

Sent = list[tuple[str, float, dict[str, str]]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """What Ray was sent."""
    received: Sent = []

    class Fake:
        def __init__(self, metric: Metric) -> None:
            self._name = metric.name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses it"
            received.append((self._name, value, tags))

        set = observe = lambda self, value, tags: received.append((self._name, value, tags))

    monkeypatch.setattr(ray_recorder, "_ray_metric", Fake)
    return received


def test_counts_are_published_together_and_once(sent: Sent) -> None:
    recorder = RayRecorder()
    for code in ("overloaded", "not_found", "overloaded"):
        recorder.count(ERRORS, code)
    recorder.count(PROMPT_TOKENS, by=40)
    recorder.count(PROMPT_TOKENS, by=0)
    assert sent == []
    recorder.publish()
    recorder.publish()
    assert sorted(sent, key=str) == [
        ("llava_errors_total", 1, {"code": "not_found"}),
        ("llava_errors_total", 2, {"code": "overloaded"}),
        ("llava_prompt_tokens_total", 40, {}),
    ]


def test_observations_are_published_at_once(sent: Sent) -> None:
    RayRecorder().observe(STAGE_DURATION, 0.25, "encode")
    assert sent == [("llava_stage_duration_seconds", 0.25, {"stage": "encode"})]


def test_watched_totals_are_published_as_increments_and_gauges_as_values(sent: Sent) -> None:
    recorder = RayRecorder()
    steps = iter([5.0, 5.0, 12.0])

    def read() -> list[Reading]:
        return [(STEPS, next(steps), ()), (RUNNING, 3, ())]

    recorder.watch(read)
    for _ in range(3):
        recorder.publish()
    assert [value for name, value, _ in sent if name == STEPS.name] == [5, 7]
    assert [value for name, value, _ in sent if name == RUNNING.name] == [3, 3, 3]


def test_a_failing_reading_costs_only_its_own_values_and_is_logged_once(
    sent: Sent, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RayRecorder()
    rounds = iter(range(9))

    def fail() -> list[Reading]:
        raise (RuntimeError if next(rounds) < 3 else KeyError)("it changed size")

    def fail_halfway() -> Iterator[Reading]:
        yield (STEPS, 1, ())
        raise RuntimeError

    recorder.watch(fail)
    recorder.watch(fail_halfway)
    recorder.watch(lambda: [(RUNNING, 3, ("a label that it does not have",))])
    recorder.watch(lambda: [(BLOCKS, 5, ("used",))])
    for _ in range(5):
        recorder.count(ERRORS, "x")
        recorder.count(PROMPT_TOKENS, "a label that it does not have")
        recorder.publish()
    read = [(BLOCKS.name, 5, {"state": "used"}), (STEPS.name, 1, {})]
    counted = (ERRORS.name, 1, {"code": "x"})
    assert sorted(sent, key=str) == sorted([*read, *[read[0]] * 4, *[counted] * 5], key=str)
    # Two ways to fail for the first.
    reasons = [record.exc_info[0] for record in caplog.records if record.exc_info]
    assert reasons == [RuntimeError, RuntimeError, ValueError, ValueError, KeyError]


def test_the_thread_outlives_a_failing_reading(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_recorder, "_PUBLISH_S", 0.001)
    is_read_again = threading.Event()
    rounds = iter(range(3))

    def read() -> list[Reading]:
        if next(rounds, None) is not None:
            raise RuntimeError
        is_read_again.set()
        return []

    RayRecorder().start().watch(read)
    assert is_read_again.wait(20)
    assert sent == []


def test_missing_labels_are_an_error(sent: Sent) -> None:
    with pytest.raises(ValueError, match="shorter"):
        RayRecorder().observe(STAGE_DURATION, 0.25)
    assert sent == []


@pytest.mark.parametrize("interruption", ["count", "publish"])
def test_no_count_is_lost_if_another_thread_interrupts_it(sent: Sent, interruption: str) -> None:
    recorder = RayRecorder()
    other = threading.Thread(
        target=recorder.publish if interruption == "publish" else lambda: recorder.count(ERRORS, "x")
    )

    class Interrupted(float):
        def __radd__(self, total: float) -> float:
            other.start()
            # Only an interruption that should have been impossible ends meanwhile.
            other.join(0.2)
            return total + float(self)

    recorder.count(ERRORS, "x", by=Interrupted(1))
    other.join()
    recorder.publish()
    assert sum(value for _, value, _ in sent) == (1 if interruption == "publish" else 2)
