"""Can the cluster ever provide what the stages ask for, and can it now? Counted from its nodes and autoscaler limit.

Works on plain numbers; other modules query Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.batch.errors import CapacityError
from cluster.batch.settings import StageName, Stages, StageSettings

Resources = Mapping[str, float]


def check_capacity(stages: Stages, reading_cpus: float, nodes: Sequence[Resources], limit: Resources | None) -> None:
    """Check that all stages fit. `limit` is the size an autoscaler may grow the cluster to, None without one.

    Raises CapacityError naming the stage that does not fit, and what the cluster has.
    """
    if limit is not None:
        _check_totals(stages, reading_cpus, limit)
        return
    free = [dict(node) for node in nodes]
    # The stages that are hardest to place come first.
    for name, stage in sorted(stages.items(), key=lambda item: (-item[1].num_gpus, -item[1].num_cpus)):
        for replica in range(stage.replicas):
            if not _place({"GPU": stage.num_gpus, "CPU": stage.num_cpus}, free):
                raise _lacking(name, stage, replica, nodes)
    if not _place({"CPU": reading_cpus}, free):
        raise CapacityError(f"the stages leave no {reading_cpus} CPUs for reading the input; {_has(nodes)}")


def waiting(stages: Stages, has: Resources, free: Resources) -> str:
    """Say why no rows may arrive for a while; `has` and `free` are totals of the whole cluster."""
    asked = ", ".join(
        f"{name} {stage.replicas} x ({stage.num_cpus:g} CPUs, {stage.num_gpus:g} GPUs)"
        for name, stage in stages.items()
    )
    left = " and ".join(f"{free.get(name, 0):.3g} of {has.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    return (
        f"none for a while: rows take long, or stages are starting or waiting for room. {left} are free, not counting "
        f"what started stages hold; the stages ask for {asked}. If they wait, stop whatever else holds resources, such "
        "as a service, or ask for less with --stage"
    )


def _place(wanted: Resources, free: list[dict[str, float]]) -> bool:
    for node in free:
        # Fractions such as 0.1 do not add up exactly.
        if all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in wanted.items()):
            for name, amount in wanted.items():
                node[name] = node.get(name, 0.0) - amount
            return True
    return False


def _lacking(name: StageName, stage: StageSettings, placed: int, nodes: Sequence[Resources]) -> CapacityError:
    return CapacityError(
        f"{name} asks for {stage.replicas} x ({stage.num_cpus:g} CPUs, {stage.num_gpus:g} GPUs), of which {placed} "
        f"fit beside the other stages; {_has(nodes)}. Ask for less with --stage {name}.replicas=, "
        ".num_cpus= or .num_gpus=, or give --wait-for-nodes if nodes will join"
    )


def _has(nodes: Sequence[Resources]) -> str:
    has = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return f"the cluster's nodes have {has}"


def _check_totals(stages: Stages, reading_cpus: float, limit: Resources) -> None:
    cpus = sum(stage.replicas * stage.num_cpus for stage in stages.values()) + reading_cpus
    gpus = sum(stage.replicas * stage.num_gpus for stage in stages.values())
    for name, amount in (("CPU", cpus), ("GPU", gpus)):
        if amount > limit.get(name, 0.0) + 1e-6:
            raise CapacityError(
                f"the stages ask for {amount:g} {name}s, and the cluster's autoscaler grows it to "
                f"{limit.get(name, 0):g} at most; ask for less with --stage"
            )
