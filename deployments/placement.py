"""Do the stages fit on these nodes? Names the resources that no node has, or that all nodes together lack.

Counts the nodes' total resources, whether in use or not. Knows settings, and nodes as Ray describes them, but not Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import LaunchError
from deployments.settings.app import AppArgs
from deployments.settings.stages import StageArgs

# The prefix with which Ray lists a node's accelerator type among its resources.
_ACCELERATOR = "accelerator_type:"
_ENOUGH = 1e-6


@dataclass(frozen=True)
class Node:
    """The resources and labels of one machine of the cluster."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """One requirement of a replica on its node, by the setting that makes it; `nearest` says what there is instead."""

    setting: str
    is_met: Callable[[Node], bool]
    nearest: Callable[[Sequence[Node]], str]


def nodes_of(described: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive, from what `ray.nodes()` returns."""
    return [Node(each["Resources"], each.get("Labels") or {}) for each in described if each["Alive"]]


def check_placement(args: AppArgs, towers: Callable[[], Mapping[str, str]], nodes: Sequence[Node]) -> None:
    """Raise LaunchError when a stage fits nowhere, or when the initial replicas together ask for more than all nodes
    have: without more nodes, Serve would wait forever.

    `towers` tells which models share one (preflight.py). It takes a while, and is called only if that matters.
    """
    own = {model.served_name: model.served_name for model in args.own_models}
    if problems := unplaceable(stages_of(args, own), nodes):
        raise LaunchError("; ".join(problems))
    if _lacking(stages_of(args, own), nodes) is not None and (problem := _lacking(stages_of(args, towers()), nodes)):
        raise LaunchError(problem)


def stages_of(args: AppArgs, towers: Mapping[str, str]) -> dict[str, StageArgs]:
    """Every stage by a readable name; `towers` names the model whose tower each model uses."""
    stages: dict[str, StageArgs] = {"gateway": args.gateway, "preprocessor": args.preprocessor}
    for model in args.own_models:
        name = model.served_name
        of_model = f" of {name}" if len(args.own_models) > 1 else ""
        if towers[name] == name:
            stages[f"vision_encoder{of_model}"] = model.vision_encoder
        stages[f"generator{of_model}"] = model.generator
    return stages


def unplaceable(stages: Mapping[str, StageArgs], nodes: Sequence[Node]) -> list[str]:
    """The reason, with the stage's name, for each stage that fits on none of these nodes."""
    return [f"{name}: {problem}" for name, args in stages.items() if (problem := _problem(args, nodes)) is not None]


def matches(condition: str, value: str | None) -> bool:
    """Whether a node with this value of a label meets a condition: `a`, `!a`, `in(a, b)` or `!in(a, b)`, as in Ray."""
    wanted = condition.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    is_one = value is not None and value in {each.strip() for each in values}
    return is_one != condition.startswith("!")


def _lacking(stages: Mapping[str, StageArgs], nodes: Sequence[Node]) -> str | None:
    wanted = {
        "CPU": sum(stage.first_replicas * stage.num_cpus for stage in stages.values()),
        "GPU": sum(stage.first_replicas * stage.num_gpus for stage in stages.values()),
    }
    for name, amount in wanted.items():
        available = sum(node.resources.get(name, 0) for node in nodes)
        if amount > available + _ENOUGH:
            return (
                f"the stages ask for {amount:g} {name}s in all, and there are {available:g}; lower "
                f"num_{name.lower()}s, min_replicas or initial_replicas in the configuration"
            )
    return None


def _problem(args: StageArgs, nodes: Sequence[Node]) -> str | None:
    needs = list(_needs(args))
    if any(all(need.is_met(node) for need in needs) for node in nodes):
        return None
    for need in needs:
        if not any(map(need.is_met, nodes)):
            return f"no node has {need.setting}; {need.nearest(nodes)}"
    return f"no node has all of this at once: {', '.join(need.setting for need in needs)}"


def _needs(args: StageArgs) -> Iterator[Need]:
    amounts = {"num_cpus": ("CPU", args.num_cpus), "num_gpus": ("GPU", args.num_gpus)}
    amounts |= {f"resources.{name}": (name, amount) for name, amount in args.resources.items()}
    for setting, (name, amount) in amounts.items():
        yield _amount(f"{setting} {amount:g}", name, amount)
    if args.accelerator_type is not None:
        yield _accelerator(args.accelerator_type)
    for key, condition in args.label_selector.items():
        yield _label(key, condition)


def _amount(setting: str, name: str, amount: float) -> Need:
    def most(nodes: Sequence[Node]) -> str:
        return f"the most that one has is {max((node.resources.get(name, 0) for node in nodes), default=0):g}"

    return Need(setting, lambda node: amount <= node.resources.get(name, 0) + _ENOUGH, most)


def _accelerator(kind: str) -> Need:
    def kinds(nodes: Sequence[Node]) -> str:
        found = {name for node in nodes for name in node.resources if name.startswith(_ACCELERATOR)}
        return _there_are(name.removeprefix(_ACCELERATOR) for name in found)

    return Need(f"accelerator_type {kind}", lambda node: f"{_ACCELERATOR}{kind}" in node.resources, kinds)


def _label(key: str, condition: str) -> Need:
    def values(nodes: Sequence[Node]) -> str:
        return _there_are({node.labels[key] for node in nodes if key in node.labels})

    return Need(f"label_selector {key}: {condition}", lambda node: matches(condition, node.labels.get(key)), values)


def _there_are(found: Iterable[str]) -> str:
    return f"there are {', '.join(sorted(found)) or 'none'}"
