"""What each replica does when it starts: load its own part of the checkpoint, and nothing else, into its plain class.

One class per stage, built from the settings alone. Networks are imported inside the constructors, so that replicas
without one never import torch. Knows how replicas log, and nothing about how many of them there are.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import ray
from ray.serve.context import _get_global_client

from deployments.access import KeyRing
from deployments.allocator import give_back_large_buffers
from deployments.cores import usable_cores
from deployments.environment import TORCH_ENVIRONMENT
from deployments.exposure import ENTRANCE_VARIABLE, check_exposure
from deployments.fetch import Fetcher
from deployments.gateway import Gateway
from deployments.generator import Generator
from deployments.handoff import Handoff
from deployments.llava_protocol.routes import ProtocolSetup
from deployments.llava_protocol.settings import WorkerArgs
from deployments.llava_protocol.shared_table import SharedTable
from deployments.llava_protocol.table import WorkerTable
from deployments.metrics import RayRecorder, engine_readings
from deployments.model_settings import ModelArgs
from deployments.passage import Handle
from deployments.pipeline import PictureStage, Pipeline
from deployments.preflight import FoundCheckpoint
from deployments.preprocessor import Preprocessor
from deployments.quarantine import Quarantine
from deployments.settings import AppArgs
from deployments.shared_cores import Cores, OwnCores, SharedCores, shared_folder
from deployments.stage_settings import ComputeArgs, StageArgs, VisionEncoderArgs
from deployments.stage_status import StageStatus, name_for_clients
from deployments.startup import Startup
from deployments.upstream import Upstream
from deployments.upstream_settings import read_key, trusted
from deployments.vision_encoder import VisionEncoder
from llava_core.errors import LlavaError
from llava_core.lru import LruCache
from llava_core.types import PreparedImage

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from torch import nn

    from llava_core.checkpoints.load import LoadOptions
    from llava_core.checkpoints.tokenizer import CheckpointTokenizer
    from llava_core.engine.engine import Engine
    from llava_core.vision.towers import VisionTower

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
# Of a network with fewer, an operation is too short to be divided among threads.
_MANY_PARAMETERS = 50_000_000


class DeviceError(LlavaError):
    """A replica cannot compute where it is told to."""


class GatewayReplica:
    """The graph's entrance; `serve.ingress` takes the ASGI app from it."""

    def __init__(
        self,
        args: AppArgs,
        preprocessor: Handle,
        encoders: Mapping[str, Handle],
        generators: Mapping[str, Handle],
        handoff: Handoff,
        table: Handle | None = None,
    ) -> None:
        """Encoders and generators come by the names of the models that use them, `table` where workers of others may
        register. Must be constructed on the event loop that will serve, as Serve does, where there are upstreams."""
        adopt_serve_logging()
        give_back_large_buffers()
        for host in in_thread_of_its_own(_listening_hosts):
            check_exposure(host, args.auth)
        recorder = RayRecorder().start()
        # One for all: what was lost may have been on a stage that models share.
        quarantine = Quarantine(args.limits.refused_seconds, recorder=recorder)
        pipelines = {
            name: Pipeline(preprocessor, encoders[name], generator, handoff, quarantine, model=name)
            for name, generator in generators.items()
        }
        pictures = PictureStage(preprocessor, handoff, quarantine)
        upstreams = {
            name: Upstream(name, each, pictures, key=read_key(each), tls=trusted(each), recorder=recorder)
            for name, each in args.upstreams.items()
        }
        # As they are named in the settings.
        models = {model.served_name: (pipelines | upstreams)[model.served_name] for model in args.models}
        self._watches = [asyncio.get_running_loop().create_task(each.watch()) for each in upstreams.values()]
        stages = [handle.deployment_name for handle in (preprocessor, *encoders.values(), *generators.values())]
        scaled: list[tuple[Handle, StageArgs]] = [(preprocessor, args.preprocessor)]
        for model in args.own_models:
            name = model.served_name
            scaled += [(encoders[name], model.vision_encoder), (generators[name], model.generator)]
        status = StageStatus(
            preprocessor.app_name,
            {name_for_clients(stage): stage for stage in stages},
            may_be_empty={handle.deployment_name for handle, stage in scaled if not stage.min_replicas},
        )
        # Serve's HTTP server puts the request id on every response itself.
        self._gateway = Gateway(
            models,
            status,
            limits=args.limits.model_copy(update={"max_requests_in_flight": args.max_requests_in_flight}),
            keys=None if args.auth.keys_file is None else KeyRing(Path(args.auth.keys_file)),
            origins=args.cors.origins,
            echo_request_id=False,
            recorder=recorder,
            llava=ProtocolSetup(args.llava_protocol, None if table is None else SharedTable(table)),
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._gateway.app


class WorkerTableReplica(WorkerTable):
    """Starts empty."""

    def __init__(self, args: WorkerArgs) -> None:
        adopt_serve_logging()
        super().__init__(args, recorder=RayRecorder().start())


class PreprocessorReplica(Preprocessor):
    """Loads tokenizer and preprocessing settings of every model. The tiles they keep share one cache."""

    def __init__(self, args: AppArgs, found: Mapping[str, FoundCheckpoint]) -> None:
        adopt_serve_logging()
        give_back_large_buffers()
        from llava_core.checkpoints.describe import load_preparer

        stage, limits = args.preprocessor, args.limits.request
        cache = LruCache[PreparedImage](stage.cache_bytes)
        preparers = {
            model.served_name: load_preparer(
                found[model.served_name].open(), template=model.template, limits=limits, cache=cache
            )
            for model in args.own_models
        }
        super().__init__(
            preparers,
            cache=cache,
            num_threads=stage.max_ongoing_requests,
            image_limits=limits.image,
            fetcher=Fetcher(args.fetch),
            recorder=RayRecorder().start(),
        )


class VisionEncoderReplica(VisionEncoder):
    """Loads the tower."""

    def __init__(self, args: VisionEncoderArgs, checkpoint: FoundCheckpoint, handoff: Handoff) -> None:
        adopt_serve_logging()
        startup = Startup()
        tower, cores = in_thread_of_its_own(lambda: _load_tower(args, checkpoint, startup))
        recorder = startup.recorder()
        super().__init__(tower, handoff, cache_bytes=args.cache_bytes, cores=cores, recorder=recorder)


class GeneratorReplica(Generator):
    """Loads projector and decoder; must be constructed on the event loop that will serve, as Serve does."""

    def __init__(self, model: ModelArgs, checkpoint: FoundCheckpoint, handoff: Handoff) -> None:
        adopt_serve_logging()
        startup = Startup()
        engine, tokenizer, cores = in_thread_of_its_own(lambda: _load_engine(model, checkpoint, startup))
        from llava_core.engine.async_engine import AsyncEngine

        running = AsyncEngine(
            engine,
            delta_gap_s=model.engine.chunk_gap_ms / 1e3,
            before_step=cores.claim,
            when_idle=cores.release,
        )
        recorder = startup.recorder()
        recorder.watch(lambda: engine_readings(engine.stats))
        super().__init__(running, handoff, token_bytes=tokenizer.token_bytes, recorder=recorder)


def _listening_hosts() -> set[str]:
    """Where Serve listens for HTTP, whoever has started it: `serve run`, another application, or Serve's HAProxy, which
    listens everywhere; and the entrance that `llava serve` has in front of it, whoever has deployed this."""
    client = _get_global_client()
    assert client is not None
    entrance = os.environ.get(ENTRANCE_VARIABLE)
    return {str(client.http_config.host), *([entrance] if entrance else [])}


def _load_tower(args: ComputeArgs, checkpoint: FoundCheckpoint, startup: Startup) -> tuple[VisionTower, Cores]:
    with startup.phase("imports"):
        options = set_up_compute(args)
        from llava_core.checkpoints.load import load_tower
        from llava_core.vision.inference import call_before_layers, ready_tower

    with startup.phase("weights"):
        tower = load_tower(checkpoint.open(), options)
        cores = share_cores(args, tower, options.device)
        ready_tower(tower)
        call_before_layers(tower, cores.claim)
    return tower, cores


def _load_engine(
    model: ModelArgs, checkpoint: FoundCheckpoint, startup: Startup
) -> tuple[Engine, CheckpointTokenizer, Cores]:
    with startup.phase("imports"):
        options = replace(set_up_compute(model.generator), quantization=model.generator.quantization)
        from llava_core.checkpoints.load import load_language_side
        from llava_core.checkpoints.tokenizer import load_tokenizer
        from llava_core.engine.engine import Engine
        from llava_core.models.fused import ready_language

    with startup.phase("weights"):
        opened = checkpoint.open()
        tokenizer = load_tokenizer(opened)
        language = load_language_side(opened, options, num_tokens=tokenizer.num_tokens)
        cores = share_cores(model.generator, language, options.device)
    with startup.phase("engine"):
        ready_language(language)
        engine = Engine(language, tokenizer, model.engine.config)
    return engine, tokenizer, cores


def in_thread_of_its_own(load: Callable[[], Loaded]) -> Loaded:
    """What `load` gives, or raises. Each thread that has computed keeps OpenMP threads until it ends; where two of them
    have some, these sleep between operations, and a step takes half as long again."""
    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(load).result()


def set_up_compute(args: ComputeArgs) -> LoadOptions:
    """Threads and device of this process. Ray would leave a replica with half a CPU one thread, so it is set here."""
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    from llava_core.checkpoints.load import LoadOptions

    threads = args.threads or usable_cores()
    torch.set_num_threads(threads)
    device = choose_device(args.device, num_gpus=len(ray.get_gpu_ids()) if ray.is_initialized() else 0)
    options = LoadOptions(device, args.dtype)
    logger.info("computing on %s in %s with %d threads", device, options.torch_dtype, threads)
    return options


def share_cores(args: ComputeArgs, network: nn.Module, device: str) -> Cores:
    """How this process gets along with others on its cores, unless its threads are set."""
    import torch

    num_cores = torch.get_num_threads()
    if args.threads is not None or device != "cpu" or num_cores == 1:
        return OwnCores()
    num_parameters = sum(value.numel() for value in network.state_dict().values())
    if num_parameters < _MANY_PARAMETERS:
        torch.set_num_threads(1)
        logger.info("%d parameters: computing with one thread", num_parameters)
        return OwnCores()
    return SharedCores(shared_folder(), num_cores, torch.set_num_threads)


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
