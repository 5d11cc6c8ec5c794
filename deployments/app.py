"""The service as a Ray Serve application: which class is which deployment, with how many replicas and what resources.

The only file that knows `serve.deployment`, `bind` and `ingress`. `build_app` is what serve_config.yaml names.
"""

import logging
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from deployments.graph.handoff import Handoff, RayHandoff
from deployments.placement import nodes_of, stages_of, unplaceable
from deployments.preflight import check_checkpoints, share_towers
from deployments.replicas import (
    GatewayReplica,
    GeneratorReplica,
    PreprocessorReplica,
    VisionEncoderReplica,
    WorkerTableReplica,
    adopt_serve_logging,
)
from deployments.settings.app import AppArgs
from deployments.settings.llava_protocol import LlavaProtocolArgs
from deployments.settings.stages import StageArgs
from llava_core.checkpoints.found import FoundCheckpoint

logger = logging.getLogger(__name__)

# A long answer outlives Serve's default of 20 s. What a stage has not finished by then resumes on another replica. A
# gateway gets as long as the longest answer may take, because its connections break when it ends.
_SHUTDOWN_S = 180.0
# Bounds how long a killed replica still counts as able to serve; Serve's default is 10 s.
_HEALTH_CHECK_S = 2.0
_ROUTER = "deployments.graph.routing.AffinityRouter"
_POLICY = "deployments.scaling:LoadPolicy"
# How often within the look-back period replicas and gateways report their load to the controller.
_LOOKS = 5


def build_app(args: AppArgs) -> Application:
    """Serve's typed application builder. Raises CheckpointError for bad checkpoints, before any replica starts."""
    # Downloads happen here, for all replicas of this machine; without Serve's handlers their log lines would be lost.
    adopt_serve_logging()
    found = check_checkpoints(args)
    towers = share_towers(args, found)
    _tell_of_missing_nodes(args, towers)
    return build_graph(args, found, towers, RayHandoff())


def _tell_of_missing_nodes(args: AppArgs, towers: Mapping[str, str]) -> None:
    """Warn about stages that fit on no current node. An autoscaler may add one, so Serve waits; or it is a mistake."""
    if ray.is_initialized():
        nodes = nodes_of(ray.nodes())  # type: ignore[no-untyped-call]
        for problem in unplaceable(stages_of(args, towers), nodes):
            logger.warning("%s. It waits for a node that has", problem)


def build_graph(
    args: AppArgs, found: Mapping[str, FoundCheckpoint], towers: Mapping[str, str], handoff: Handoff
) -> Application:
    """Gateway → Preprocessor → VisionEncoder → Generator, as bound deployments."""
    gateway = _deploy(serve.ingress()(GatewayReplica), "Gateway", args.gateway).options(
        graceful_shutdown_timeout_s=max(_SHUTDOWN_S, args.limits.max_timeout_seconds)
    )
    return gateway.bind(args, *bind_stages(args, found, towers, handoff), handoff, _bind_table(args.llava_protocol))


def _bind_table(args: LlavaProtocolArgs) -> Application | None:
    """The table of self-registered workers: one for all gateways, or None where registration is off. It only answers
    lookups, so it reserves no CPU."""
    if not args.enabled or not args.workers.allowed_hosts:
        return None
    return _deploy(WorkerTableReplica, "WorkerTable", StageArgs(num_cpus=0, max_ongoing_requests=1000)).bind(
        args.workers
    )


def bind_stages(
    args: AppArgs, found: Mapping[str, FoundCheckpoint], towers: Mapping[str, str], handoff: Handoff
) -> tuple[Application, dict[str, Application], dict[str, Application]]:
    """The stages behind the gateway: one preprocessor for all models, and by name the encoder and the generator of each
    model that has no upstream.

    `towers` names the model whose tower each model uses. Where there are several deployments of a kind, their names end
    in the model's.
    """
    preprocessor = _stage(PreprocessorReplica, "Preprocessor", args.preprocessor).bind(args, found)
    encoders: dict[str, Application] = {}
    generators: dict[str, Application] = {}
    are_towers_several = len(set(towers.values())) > 1
    for model in args.own_models:
        name, owner = model.served_name, towers[model.served_name]
        checkpoint = found[name]
        if owner == name:
            encoder = f"VisionEncoder-{model.label}" if are_towers_several else "VisionEncoder"
            deployed = _stage(VisionEncoderReplica, encoder, model.vision_encoder)
            encoders[name] = deployed.bind(model.vision_encoder, checkpoint, handoff)
        # The owner of a shared tower comes first, so its encoder exists.
        encoders[name] = encoders[owner]
        generator = f"Generator-{model.label}" if len(args.own_models) > 1 else "Generator"
        deployed = _stage(GeneratorReplica, generator, model.generator, capacity=model.engine.config.max_requests)
        generators[name] = deployed.bind(model, checkpoint, handoff)
    return preprocessor, encoders, generators


def _stage(cls: Any, name: str, args: StageArgs, **router: int) -> Deployment:
    config = {"request_router_class": _ROUTER, "request_router_kwargs": router}
    return _deploy(cls, name, args).options(request_router_config=config)


def _deploy(cls: Any, name: str, args: StageArgs) -> Deployment:
    decorate = serve.deployment(
        name=name,
        ray_actor_options=_resources(args),
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
        health_check_period_s=_HEALTH_CHECK_S,
        # A constructor fails because of the checkpoint or the memory, and would fail again.
        max_constructor_retry_count=1,
        **_scale(args),
    )
    deployment: Deployment = decorate(cls)
    return deployment


def _resources(args: StageArgs) -> dict[str, Any]:
    needs = {
        "num_gpus": args.num_gpus,
        "accelerator_type": args.accelerator_type,
        "label_selector": args.label_selector,
        "resources": args.resources,
    }
    return {"num_cpus": args.num_cpus} | {name: value for name, value in needs.items() if value}


def _scale(args: StageArgs) -> dict[str, Any]:
    spread = {"max_replicas_per_node": args.max_replicas_per_node} if args.max_replicas_per_node else {}
    if args.min_replicas == args.max_replicas:
        return {"num_replicas": args.min_replicas, **spread}
    given = args.autoscaling
    policy = {"targets": given.targets, "tolerance": given.tolerance}
    scaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        # Set only where needed: Serve also applies it on every update, whatever the current number of replicas.
        initial_replicas=args.first_replicas if args.first_replicas > args.min_replicas else None,
        look_back_period_s=given.look_back_s,
        metrics_interval_s=given.look_back_s / _LOOKS,
        upscale_delay_s=given.upscale_delay_s,
        downscale_delay_s=given.downscale_delay_s,
        downscale_to_zero_delay_s=given.downscale_to_zero_delay_s,
        policy=AutoscalingPolicy(policy_function=_POLICY, policy_kwargs=policy),  # type: ignore[no-untyped-call]
    )
    return {"autoscaling_config": scaling, **spread}
