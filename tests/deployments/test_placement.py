"""Stages against the existing nodes: what fits, and the message where it does not."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from deployments.errors import LaunchError
from deployments.placement import Node, check_placement, matches, nodes_of, unplaceable
from deployments.settings.app import AppArgs
from deployments.settings.stages import GeneratorArgs, StageArgs

CPU_NODE = Node({"CPU": 8.0, "memory": 1e9}, {"ray.io/node-id": "1", "zone": "a"})
GPU_NODE = Node({"CPU": 4.0, "GPU": 2.0, "accelerator_type:A100": 1.0, "disk": 3.0}, {"zone": "b"})
NODES = [CPU_NODE, GPU_NODE]


def _towers(**shared: str) -> Callable[[], dict[str, str]]:
    return lambda: shared


def _never() -> dict[str, str]:
    raise AssertionError("comparing towers reads all of them")


def test_missing_resources_abort_the_start() -> None:
    check_placement(AppArgs(), _never, [Node({"CPU": 1.0})])
    own = {"scenes-llava": "scenes-llava"}
    with pytest.raises(LaunchError, match=r"ask for 1 CPUs in all, and there are 0\.5; lower num_cpus"):
        check_placement(AppArgs(), _towers(**own), [Node({"CPU": 0.5})])
    args = AppArgs(generator=GeneratorArgs(num_gpus=1, min_replicas=2, max_replicas=2))
    with pytest.raises(LaunchError, match="generator: no node has num_gpus 1; the most that one has is 0"):
        check_placement(args, _never, [Node({"CPU": 8.0})])
    with pytest.raises(LaunchError, match="ask for 2 GPUs in all, and there are 1; lower num_gpus"):
        check_placement(args, _towers(**own), [Node({"CPU": 8.0, "GPU": 1.0})])
    # On two machines too.
    check_placement(args, _never, [Node({"CPU": 8.0, "GPU": 1.0})] * 2)


def test_stages_starting_at_zero_need_room_for_one_replica_at_a_time() -> None:
    own = {"scenes-llava": "scenes-llava"}
    stage = {"num_cpus": 1, "min_replicas": 0, "initial_replicas": 0}
    args = AppArgs.model_validate({"vision_encoder": stage, "generator": stage})
    check_placement(args, _never, [Node({"CPU": 1.0})])
    with pytest.raises(LaunchError, match=r"vision_encoder: no node has num_cpus 1; .* 0\.9; generator: "):
        check_placement(args, _never, [Node({"CPU": 0.9})])
    # One replica of each starts by default, so that errors show at the start.
    stage.pop("initial_replicas")
    args = AppArgs.model_validate({"vision_encoder": stage, "generator": stage})
    with pytest.raises(LaunchError, match=r"ask for 2\.3 CPUs in all, and there are 1"):
        check_placement(args, _towers(**own), [Node({"CPU": 1.0})])


def test_a_tower_shared_by_models_counts_once() -> None:
    entries = [{"name": "a"}, {"name": "b", "generator": {"num_cpus": 0.8}}]
    args = AppArgs.model_validate({"models": entries})
    # 0.1 for the gateway, 0.2 for the preprocessor, 0.4 and 0.8 for generators, 0.3 for each encoder.
    check_placement(args, _never, [Node({"CPU": 2.1})])
    check_placement(args, _towers(a="a", b="a"), [Node({"CPU": 1.8})])
    with pytest.raises(LaunchError, match=r"ask for 1\.8 CPUs in all, and there are 1\.7"):
        check_placement(args, _towers(a="a", b="a"), [Node({"CPU": 1.7})])
    with pytest.raises(LaunchError, match=r"ask for 2\.1 CPUs"):
        check_placement(args, _towers(a="a", b="b"), [Node({"CPU": 1.8})])
    args = AppArgs.model_validate({"models": entries, "generator": {"resources": {"tpu": 1}}})
    with pytest.raises(LaunchError, match=r"^generator of a: no node has resources\.tpu 1; .*; generator of b: "):
        check_placement(args, _never, [Node({"CPU": 8.0})])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, None),
        ({"num_cpus": 8}, None),
        ({"num_cpus": 9}, "no node has num_cpus 9; the most that one has is 8"),
        ({"num_gpus": 2, "accelerator_type": "A100", "label_selector": {"zone": "b"}}, None),
        ({"num_gpus": 3}, "no node has num_gpus 3; the most that one has is 2"),
        ({"accelerator_type": "H100"}, "no node has accelerator_type H100; there are A100"),
        ({"label_selector": {"zone": "c"}}, "no node has label_selector zone: c; there are a, b"),
        ({"label_selector": {"rack": "1"}}, "no node has label_selector rack: 1; there are none"),
        ({"resources": {"disk": 3}}, None),
        ({"resources": {"disk": 4}}, "no node has resources.disk 4; the most that one has is 3"),
        (
            {"num_cpus": 8, "num_gpus": 1},
            "no node has all of this at once: num_cpus 8, num_gpus 1",
        ),
        (
            {"num_cpus": 1, "num_gpus": 1, "label_selector": {"zone": "!b"}},
            "no node has all of this at once: num_cpus 1, num_gpus 1, label_selector zone: !b",
        ),
    ],
)
def test_an_unplaceable_stage_is_named_with_the_available_resources(
    settings: Mapping[str, Any], problem: str | None
) -> None:
    found = unplaceable({"encoder": StageArgs.model_validate(settings)}, NODES)
    assert found == ([] if problem is None else [f"encoder: {problem}"])


@pytest.mark.parametrize(
    ("condition", "matching"),
    [
        ("a", {"a"}),
        ("!a", {"b", "c", None}),
        ("in(a, b)", {"a", "b"}),
        ("in(a,b)", {"a", "b"}),
        ("!in(a, b)", {"c", None}),
    ],
)
def test_label_conditions_have_rays_meaning(condition: str, matching: set[str | None]) -> None:
    assert {value for value in ("a", "b", "c", None) if matches(condition, value)} == matching


def test_dead_nodes_do_not_count() -> None:
    described = [
        {"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {"zone": "a"}},
        {"Alive": False, "Resources": {"CPU": 9.0}, "Labels": {}},
        {"Alive": True, "Resources": {"CPU": 2.0}},
    ]
    assert nodes_of(described) == [Node({"CPU": 1.0}, {"zone": "a"}), Node({"CPU": 2.0})]
