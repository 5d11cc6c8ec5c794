"""How many replicas a load needs: targets are met, no replica is superfluous, and the number does not oscillate."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.scaling import BUSY, HELD_REQUESTS, REQUESTS, LoadPolicy, clamp

TOLERANCE = 0.1
amounts = st.floats(0, 1000)
counts = st.integers(0, 50)


@dataclass
class Stage:
    """A made-up context: what each running replica reports."""

    reported: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    running_replicas: tuple[str, ...] = ("a", "b")
    target_num_replicas: int = 2
    total_num_requests: float = 1
    total_queued_requests: float = 0

    @property
    def current_num_replicas(self) -> int:
        return len(self.running_replicas)

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]]:
        return self.reported


def _wanted(stage: Stage, tolerance: float = TOLERANCE, **targets: float) -> int:
    wanted, kept = LoadPolicy(targets, tolerance)(stage)
    assert kept == {}
    return wanted


@pytest.mark.parametrize(
    ("tiles", "wanted"),
    [((0, 0), 1), ((3, 4), 1), ((10, 0), 1), ((10, 10), 2), ((10, 11), 3), ((40, 2), 5), ((100, 0), 10)],
)
def test_a_signal_asks_for_its_total_divided_by_the_target(tiles: tuple[float, float], wanted: int) -> None:
    reported = {"tiles": dict(zip("ab", tiles, strict=True))}
    assert _wanted(Stage(reported), tolerance=0, tiles=10) == wanted


def test_the_highest_demand_wins_and_signals_without_a_target_are_ignored() -> None:
    reported = {"tiles": {"a": 5.0, "b": 5.0}, BUSY: {"a": 1.0, "b": 0.9}, "more": {"a": 99.0, "b": 99.0}}
    assert _wanted(Stage(reported), tiles=10, busy=0.5) == 4
    assert _wanted(Stage(reported), tiles=1, busy=0.5) == 10


def test_the_request_signal_is_serves_own_count() -> None:
    assert _wanted(Stage(total_num_requests=41, total_queued_requests=40), **{REQUESTS: 10}) == 5


def test_queued_requests_count_like_held_ones_but_not_towards_busy_time() -> None:
    reported = {"tiles": {"a": 20.0, "b": 20.0}, BUSY: {"a": 0.4, "b": 0.4}, HELD_REQUESTS: {"a": 2.0, "b": 2.0}}
    # Four requests have 40 tiles, so eight more have 80.
    stage = Stage(reported, total_num_requests=12, total_queued_requests=8)
    assert _wanted(stage, tiles=20) == 6
    assert _wanted(stage, busy=0.8) == 2


@pytest.mark.parametrize("reported", [{}, {"tiles": {"a": 1.0}}, {"tiles": {"a": 1.0, "gone": 500.0}}])
def test_no_scale_down_until_every_replica_has_reported(reported: Mapping[str, Mapping[str, float]]) -> None:
    assert _wanted(Stage(reported, target_num_replicas=2), tiles=10) == 2
    # Another metric may require more.
    busy = {**reported, BUSY: {"a": 1.0, "b": 1.0}}
    assert _wanted(Stage(busy), tiles=10, busy=0.5) == 4


def test_reports_of_removed_replicas_do_not_count() -> None:
    assert _wanted(Stage({"tiles": {"a": 4.0, "b": 5.0, "gone": 500.0}}), tiles=10) == 1


def test_without_a_running_replica_the_target_stays() -> None:
    for target in (0, 1, 3):
        assert _wanted(Stage(running_replicas=(), target_num_replicas=target), tiles=10) == target


def test_no_work_needs_no_replica_and_an_incoming_request_needs_one() -> None:
    idle = {"tiles": {"a": 0.0, "b": 0.0}}
    assert _wanted(Stage(idle, total_num_requests=0), tiles=10) == 0
    assert _wanted(Stage(idle, total_num_requests=0.1), tiles=10) == 1


@given(present=counts, needed=amounts, more=amounts, tolerance=st.floats(0, 1))
def test_more_work_never_means_fewer_replicas(present: int, needed: float, more: float, tolerance: float) -> None:
    assert clamp(present, needed, tolerance) <= clamp(present, needed + more, tolerance)


@given(tiles=st.tuples(amounts, amounts), more=amounts, present=counts, queued=amounts)
def test_more_of_any_signal_never_means_fewer_replicas(
    tiles: tuple[float, float], more: float, present: int, queued: float
) -> None:
    def wanted(extra: float, waiting: float) -> int:
        reported = {"tiles": {"a": tiles[0] + extra, "b": tiles[1]}, HELD_REQUESTS: {"a": 1.0, "b": 2.0}}
        stage = Stage(reported, target_num_replicas=present, total_num_requests=3, total_queued_requests=waiting)
        return _wanted(stage, tiles=7)

    assert wanted(0, 0) <= wanted(more, 0) <= wanted(more, queued)


@given(present=counts, needed=amounts, tolerance=st.floats(0, 1))
def test_the_number_is_enough_and_not_much_too_large(present: int, needed: float, tolerance: float) -> None:
    wanted = clamp(present, needed, tolerance)
    assert wanted >= needed - 1e-3
    assert wanted <= max(math.ceil(needed), math.ceil(needed * (1 + tolerance)))


@given(present=counts, needed=amounts, tolerance=st.floats(0, 1))
def test_constant_load_causes_at_most_one_change(present: int, needed: float, tolerance: float) -> None:
    moved = clamp(present, needed, tolerance)
    assert clamp(moved, needed, tolerance) == moved


@given(
    present=counts,
    load=st.floats(0.1, 30),
    noise=st.lists(st.floats(-0.04, 0.04), min_size=1, max_size=50),
)
def test_load_noise_within_the_tolerance_changes_the_number_one_way_only(
    present: int, load: float, noise: list[float]
) -> None:
    """From 4 % below to 4 % above is a change of less than a tenth."""
    numbers = [present]
    for each in noise:
        numbers.append(clamp(numbers[-1], load * (1 + each), TOLERANCE))
    moves = {after > before for before, after in itertools.pairwise(numbers) if after != before}
    assert len(moves) <= 1


def _simulate(loads: list[float], **config: Any) -> list[int]:
    """Simulate the policy with Serve's own bounds and delays, a decision each second; replicas start at once."""
    scaling = AutoscalingConfig(min_replicas=0, max_replicas=6, look_back_period_s=10, metrics_interval_s=2, **config)
    decide = _apply_autoscaling_config(LoadPolicy({"tiles": 10}, TOLERANCE))
    number, state, numbers = 0, {}, []
    clock = pytest.MonkeyPatch()
    for second, load in enumerate(loads):
        replicas = [f"{index}" for index in range(number)]
        context = AutoscalingContext(
            deployment_id=DeploymentID("Stage", "llava"),
            deployment_name="Stage",
            app_name="llava",
            current_num_replicas=number,
            target_num_replicas=number,
            running_replicas=replicas,  # type: ignore[arg-type]
            total_num_requests=load,
            total_queued_requests=0.0,
            aggregated_metrics={"tiles": {each: load / number for each in replicas}},  # type: ignore[misc]
            raw_metrics={},
            capacity_adjusted_min_replicas=0,
            capacity_adjusted_max_replicas=6,
            policy_state=state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=float(second),
            config=scaling,
        )
        with clock.context() as patched:
            patched.setattr("time.time", lambda now=second: float(now))
            wanted, state = decide(context)  # type: ignore[arg-type]
        number = min(6, wanted)
        numbers.append(number)
    return numbers


def test_a_rise_and_fall_of_load_is_followed_once_with_serves_delays() -> None:
    delays = {"upscale_delay_s": 3, "downscale_delay_s": 20, "downscale_to_zero_delay_s": 30}
    loads = [0] * 5 + [8] * 10 + [38] * 40 + [12] * 60 + [0] * 100
    numbers = _simulate([float(load) for load in loads], **delays)
    changes = [
        (second, after) for second, (before, after) in enumerate(itertools.pairwise(numbers), 1) if before != after
    ]
    # The first replica starts at once, the others after 3 s; they stop after 20 s, and the last one 30 s later.
    assert changes == [(5, 1), (18, 4), (75, 2), (135, 1), (166, 0)]


def test_a_burst_shorter_than_the_delay_starts_no_replica() -> None:
    loads = ([8.0] * 8 + [60.0] * 2) * 10
    assert set(_simulate(loads, upscale_delay_s=3, downscale_delay_s=20)) == {1}
