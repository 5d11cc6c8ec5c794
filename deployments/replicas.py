"""What each replica does when it starts: load its own part of the checkpoint, and nothing else, into its plain class.

One class per stage, built from the settings alone. Networks are imported inside the constructors, so that replicas
without one never import torch. Knows how replicas log, and nothing about how many of them there are.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.serve.handle import DeploymentHandle

from deployments.cores import usable_cores
from deployments.gateway import Gateway
from deployments.generator import Generator
from deployments.handoff import Handoff
from deployments.pipeline import Pipeline
from deployments.preflight import FoundCheckpoint
from deployments.preprocessor import Preprocessor
from deployments.settings import AppArgs, ComputeArgs
from deployments.stage_status import StageStatus
from deployments.vision_encoder import VisionEncoder
from llava_core.errors import LlavaError

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from llava_core.checkpoints.load import LoadOptions

logger = logging.getLogger(__name__)


class DeviceError(LlavaError):
    """A replica cannot compute where it is told to."""


class GatewayReplica:
    """The graph's entrance; `serve.ingress` takes the ASGI app from it."""

    def __init__(
        self,
        args: AppArgs,
        preprocessor: DeploymentHandle[Any],
        encoder: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        handoff: Handoff,
    ) -> None:
        adopt_serve_logging()
        pipeline = Pipeline(preprocessor, encoder, generator, handoff)
        stages = {"preprocessor": preprocessor, "vision_encoder": encoder, "generator": generator}
        status = StageStatus(generator.app_name, {name: handle.deployment_name for name, handle in stages.items()})
        # Serve's HTTP server puts the request id on every response itself.
        self._gateway = Gateway(
            pipeline, status, model_name=args.served_name, limits=args.limits, echo_request_id=False
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        return self._gateway.app


class PreprocessorReplica(Preprocessor):
    """Loads tokenizer and preprocessing settings."""

    def __init__(self, args: AppArgs, checkpoint: FoundCheckpoint) -> None:
        adopt_serve_logging()
        from llava_core.checkpoints.describe import load_preparer

        stage = args.preprocessor
        preparer = load_preparer(
            checkpoint.open(), template=args.template, limits=args.limits.request, cache_bytes=stage.cache_bytes
        )
        super().__init__(preparer, num_threads=stage.max_ongoing_requests)


class VisionEncoderReplica(VisionEncoder):
    """Loads the tower."""

    def __init__(self, args: AppArgs, checkpoint: FoundCheckpoint, handoff: Handoff) -> None:
        adopt_serve_logging()
        from llava_core.checkpoints.load import load_tower
        from llava_core.vision.inference import ready_tower

        options = set_up_compute(args.vision_encoder)
        tower = load_tower(checkpoint.open(), options)
        ready_tower(tower)
        super().__init__(tower, handoff, cache_bytes=args.vision_encoder.cache_bytes)


class GeneratorReplica(Generator):
    """Loads projector and decoder; must be constructed on the event loop that will serve, as Serve does."""

    def __init__(self, args: AppArgs, checkpoint: FoundCheckpoint, handoff: Handoff) -> None:
        adopt_serve_logging()
        from llava_core.checkpoints.load import load_language_side
        from llava_core.checkpoints.tokenizer import load_tokenizer
        from llava_core.engine.async_engine import AsyncEngine
        from llava_core.engine.engine import Engine
        from llava_core.models.fused import ready_language

        options = replace(set_up_compute(args.generator), quantization=args.generator.quantization)
        opened = checkpoint.open()
        tokenizer = load_tokenizer(opened)
        language = load_language_side(opened, options, num_tokens=tokenizer.num_tokens)
        ready_language(language)
        engine = Engine(language, tokenizer, args.engine.config)
        super().__init__(AsyncEngine(engine), handoff, chunk_gap_s=args.engine.chunk_gap_ms / 1e3)


def set_up_compute(args: ComputeArgs) -> LoadOptions:
    """Threads and device of this process. Ray would leave a replica with half a CPU one thread, so it is set here."""
    import torch

    from llava_core.checkpoints.load import LoadOptions

    threads = args.threads or usable_cores()
    torch.set_num_threads(threads)
    device = choose_device(args.device, num_gpus=len(ray.get_gpu_ids()) if ray.is_initialized() else 0)
    options = LoadOptions(device, args.dtype)
    logger.info("computing on %s in %s with %d threads", device, options.torch_dtype, threads)
    return options


def choose_device(asked: str, *, num_gpus: int) -> str:
    """`auto` is the GPU that Ray has given this replica, the CPU if it has given none: Ray hides none from it.

    Raises DeviceError when there is no CUDA where it is called for.
    """
    import torch

    device = asked if asked != "auto" else "cuda" if num_gpus else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {asked} with {num_gpus} GPUs from Ray calls for CUDA, and torch {torch.__version__} finds none; "
            "install torch for this GPU, or set num_gpus: 0 and device: cpu"
        )
    return device


def adopt_serve_logging() -> None:
    """Send our log records where Serve's go, into the replica's log file, with its request ids."""
    serve_logger = logging.getLogger("ray.serve")
    for name in ("deployments", "llava_core"):
        ours = logging.getLogger(name)
        ours.handlers = serve_logger.handlers
        ours.setLevel(logging.INFO)
        ours.propagate = not serve_logger.handlers
