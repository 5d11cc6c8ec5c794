"""The service as a Ray Serve application: which class is which deployment, with how many replicas and what resources.

The only file that knows `serve.deployment`, `bind` and `ingress`. `build_app` is what serve_config.yaml names.
"""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig

from deployments.handoff import Handoff, RayHandoff
from deployments.llava_protocol.settings import LlavaProtocolArgs
from deployments.preflight import FoundCheckpoint, check_checkpoints, share_towers
from deployments.replicas import (
    GatewayReplica,
    GeneratorReplica,
    PreprocessorReplica,
    VisionEncoderReplica,
    WorkerTableReplica,
    adopt_serve_logging,
)
from deployments.settings import AppArgs
from deployments.stage_settings import StageArgs

# A long answer outlives Serve's 20 seconds.
_SHUTDOWN_S = 180.0
# How long a replica that was killed still counts as one that can serve, where Serve's default is 10 s.
_HEALTH_CHECK_S = 2.0
_ROUTER = "deployments.routing.AffinityRouter"


def build_app(args: AppArgs) -> Application:
    """Serve's typed application builder. Raises CheckpointError before any replica starts, where it can be known."""
    # What is fetched is fetched here, for all replicas of this machine, and nobody sees our own loggers.
    adopt_serve_logging()
    found = check_checkpoints(args)
    return build_graph(args, found, share_towers(args, found), RayHandoff())


def build_graph(
    args: AppArgs, found: Mapping[str, FoundCheckpoint], towers: Mapping[str, str], handoff: Handoff
) -> Application:
    """Gateway → Preprocessor → VisionEncoder → Generator, as bound deployments."""
    gateway = _deploy(serve.ingress()(GatewayReplica), "Gateway", args.gateway)
    return gateway.bind(args, *bind_stages(args, found, towers, handoff), handoff, _bind_table(args.llava_protocol))


def _bind_table(args: LlavaProtocolArgs) -> Application | None:
    """Of the workers that register themselves: one for all gateways, and none where nobody may register. It waits for
    nothing and needs no place among the CPUs."""
    if not args.enabled or not args.workers.allowed_hosts:
        return None
    return _deploy(WorkerTableReplica, "WorkerTable", StageArgs(num_cpus=0, max_ongoing_requests=1000)).bind(
        args.workers
    )


def bind_stages(
    args: AppArgs, found: Mapping[str, FoundCheckpoint], towers: Mapping[str, str], handoff: Handoff
) -> tuple[Application, dict[str, Application], dict[str, Application]]:
    """The stages behind the gateway: the preprocessor of all models, and encoder and generator of each by its name,
    where it has no upstream.

    `towers` names the model whose tower each model uses. What there are several of is called after its model.
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
        # Who shares comes after its owner.
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
        # What fails in a constructor is the checkpoint or the memory, and would fail again.
        max_constructor_retry_count=1,
        **_scale(args),
    )
    deployment: Deployment = decorate(cls)
    return deployment


def _resources(args: StageArgs) -> dict[str, Any]:
    wanted = {"num_gpus": args.num_gpus, "label_selector": args.node_labels}
    return {"num_cpus": args.num_cpus} | {name: value for name, value in wanted.items() if value}


def _scale(args: StageArgs) -> dict[str, Any]:
    if args.min_replicas == args.max_replicas:
        return {"num_replicas": args.min_replicas}
    scaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=args.target_ongoing_requests,
    )
    return {"autoscaling_config": scaling}
