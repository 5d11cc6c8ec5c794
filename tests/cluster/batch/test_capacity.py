"""Asking for more than a cluster can ever have is reported at once, with what it has."""

import pytest

from cluster.batch.capacity import check_capacity, waiting
from cluster.batch.errors import CapacityError
from cluster.batch.settings import read_stages

LAPTOP = {"CPU": 2.0}


def check(*words: str, nodes: list[dict[str, float]], limit: dict[str, float] | None = None) -> None:
    check_capacity(read_stages(words), 0.1, nodes, limit)


def test_stages_that_fit_are_accepted() -> None:
    check(nodes=[{"CPU": 1.0}])
    check("generate.num_gpus=1", "generate.replicas=2", nodes=[LAPTOP, {"CPU": 8.0, "GPU": 1}, {"CPU": 8.0, "GPU": 1}])
    check("generate.num_gpus=0.9", "encode.num_gpus=0.1", nodes=[{"CPU": 8.0, "GPU": 1}])


@pytest.mark.parametrize(
    ("words", "nodes", "message"),
    [
        (["generate.num_gpus=1"], [LAPTOP], r"generate asks for 1 x .*; the cluster's nodes have 2 CPUs and 0 GPUs"),
        (["encode.num_cpus=3"], [LAPTOP, LAPTOP], "encode asks for"),
        (["generate.num_gpus=2"], [{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], "generate asks for"),
        (["generate.num_gpus=0.6", "encode.num_gpus=0.6"], [{"CPU": 8, "GPU": 1}], "of which 0 fit beside"),
        (["generate.replicas=9"], [LAPTOP], "of which"),
        (["preprocess.num_cpus=1.5"], [LAPTOP], "leave no 0.1 CPUs for reading"),
    ],
)
def test_stages_that_fit_on_no_node_are_named(words: list[str], nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(CapacityError, match=message):
        check(*words, nodes=nodes)


def test_the_autoscalers_limit_is_taken_into_account() -> None:
    check("generate.num_gpus=1", nodes=[LAPTOP], limit={"CPU": 100, "GPU": 1})
    with pytest.raises(CapacityError, match="ask for 2 GPUs, and the cluster's autoscaler grows it to 1 at most"):
        check("generate.num_gpus=1", "generate.replicas=2", nodes=[LAPTOP], limit={"CPU": 100, "GPU": 1})


def test_free_and_requested_resources_are_reported() -> None:
    message = waiting(read_stages(["generate.num_gpus=1"]), {"CPU": 8.0, "GPU": 1.0}, {"CPU": 0.1})
    assert "0.1 of 8 CPUs and 0 of 1 GPUs are free" in message
    assert "generate 1 x (0.25 CPUs, 1 GPUs)" in message
    assert "stop whatever else holds resources, such as a service, or ask for less with --stage" in message
