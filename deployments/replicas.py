"""What each replica does when it starts: load its own part of the checkpoint, and nothing else, into its plain class.

One class per stage, built from the settings alone. Networks are imported inside the constructors, so that replicas
without one never import torch. Knows how replicas log, but nothing about how many of them there are.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.serve.context import _get_global_client

from deployments.access.authorization import KeyRing
from deployments.access.exposure import ENTRANCE_VARIABLE, check_exposure
from deployments.allocator import give_back_large_buffers
from deployments.gateway import Gateway
from deployments.generator import Generator
from deployments.graph.handoff import Handoff
from deployments.graph.pipeline import PictureStage, Pipeline
from deployments.graph.quarantine import Quarantine
from deployments.graph.signs_of_life import StillHere, with_signs
from deployments.graph.stage_call import Handle
from deployments.graph.stage_status import StageStatus, name_for_clients
from deployments.llava_protocol.routes import ProtocolSetup
from deployments.llava_protocol.shared_table import SharedTable
from deployments.llava_protocol.table import WorkerTable
from deployments.messages import Item
from deployments.metrics import engine_readings
from deployments.outgoing.fetch import Fetcher
from deployments.preprocessor import Preprocessor
from deployments.ray_recorder import RayRecorder
from deployments.settings.app import AppArgs
from deployments.settings.llava_protocol import WorkerArgs
from deployments.settings.models import ModelArgs
from deployments.settings.stages import StageArgs, VisionEncoderArgs
from deployments.settings.upstreams import read_key, trusted
from deployments.startup import Startup
from deployments.upstreams.upstream import Upstream
from deployments.vision_encoder import VisionEncoder
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.lru import LruCache
from llava_core.stages.loading import in_thread_of_its_own, load_encoder, load_engine
from llava_core.types import BegunAnswer, PreparedImage

if TYPE_CHECKING:
    from starlette.types import ASGIApp

logger = logging.getLogger(__name__)


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
        """`encoders` and `generators` are by the names of the models that use them; `table` is given if external
        workers may register. With upstreams it must be constructed on the event loop that will serve, as Serve does."""
        adopt_serve_logging()
        give_back_large_buffers()
        for host in in_thread_of_its_own(_listening_hosts):
            check_exposure(host, args.auth)
        recorder = RayRecorder().start()
        # One for all models: a lost request may have been on a stage that they share.
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
        # In the order of the settings.
        models = {model.served_name: (pipelines | upstreams)[model.served_name] for model in args.models}
        self._watches = [asyncio.get_running_loop().create_task(each.watch()) for each in upstreams.values()]
        stages: dict[str, StageArgs] = {preprocessor.deployment_name: args.preprocessor}
        for model in args.own_models:
            # The stage of a shared tower has the settings of the first model that uses it.
            stages.setdefault(encoders[model.served_name].deployment_name, model.vision_encoder)
        for model in args.own_models:
            stages[generators[model.served_name].deployment_name] = model.generator
        status = StageStatus(
            preprocessor.app_name,
            {name_for_clients(stage): stage for stage in stages},
            may_be_empty={stage for stage, settings in stages.items() if not settings.min_replicas},
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
    """The table of external workers. Starts empty."""

    def __init__(self, args: WorkerArgs) -> None:
        adopt_serve_logging()
        super().__init__(args, recorder=RayRecorder().start())


class PreprocessorReplica(Preprocessor):
    """Loads tokenizer and preprocessing settings of every model. All models share one cache of tiles."""

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
        loading = partial(load_encoder, checkpoint.open(), args.compute, num_gpus=num_gpus(), phase=startup.phase)
        tower, cores = in_thread_of_its_own(loading)
        recorder = startup.recorder()
        super().__init__(tower, handoff, cache_bytes=args.cache_bytes, cores=cores, recorder=recorder)


class GeneratorReplica(Generator):
    """Loads projector and decoder; must be constructed on the event loop that will serve, as Serve does."""

    def __init__(self, model: ModelArgs, checkpoint: FoundCheckpoint, handoff: Handoff) -> None:
        adopt_serve_logging()
        startup = Startup()
        opened, compute = checkpoint.open(), model.generator.compute
        loading = partial(load_engine, opened, compute, model.engine.config, num_gpus=num_gpus(), phase=startup.phase)
        engine, tokenizer, cores = in_thread_of_its_own(loading)
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

    async def generate(  # type: ignore[override]
        self, given: object, begun: Sequence[BegunAnswer] = ()
    ) -> AsyncGenerator[Item | StillHere, None]:
        """As Generator does, but with signs of life between hosts."""
        async with aclosing(with_signs(super().generate(given, begun))) as items:
            async for item in items:
                yield item


def _listening_hosts() -> set[str]:
    """Where Serve listens for HTTP, however it was started: by `serve run`, by another application, or with Serve's
    HAProxy, which listens everywhere; and where the entrance of `llava serve` listens, if there is one."""
    client = _get_global_client()
    assert client is not None
    entrance = os.environ.get(ENTRANCE_VARIABLE)
    return {str(client.http_config.host), *([entrance] if entrance else [])}


def num_gpus() -> float:
    """How many GPUs Ray has assigned to this replica. torch may see more: Ray need not hide the others from it."""
    return len(ray.get_gpu_ids()) if ray.is_initialized() else 0


def adopt_serve_logging() -> None:
    """Send our log records to where Serve's go: the replica's log file, with Serve's request ids. Leave out Serve's
    warnings about calls that a full replica does not take."""
    serve_logger = logging.getLogger("ray.serve")
    serve_logger.addFilter(_is_news)
    for name in ("deployments", "llava_core"):
        ours = logging.getLogger(name)
        ours.handlers = serve_logger.handlers
        ours.setLevel(logging.INFO)
        ours.propagate = not serve_logger.handlers


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of Serve's says more than that a replica is busy. The router tries another one or waits: under
    load that happens more than once for each request, and no client notices."""
    return not str(record.msg).startswith("Replica at capacity of max_ongoing_requests=")
