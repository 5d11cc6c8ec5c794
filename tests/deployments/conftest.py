"""The graph in this process, through Serve's local testing mode, behind the real gateway: no cluster, no network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from starlette.testclient import TestClient

from deployments.app import bind_stages
from deployments.gateway import Gateway
from deployments.graph.handoff import LocalHandoff
from deployments.graph.pipeline import Pipeline
from deployments.preflight import check_checkpoints, share_towers
from deployments.settings.app import AppArgs, LimitArgs
from deployments.settings.stages import GeneratorArgs, VisionEncoderArgs
from tests.deployments.fakes import all_ready
from tests.deployments.service import long_checkpoint

LIMITS = LimitArgs(max_body_bytes=2_000_000, max_images=3, max_image_bytes=200_000, max_image_pixels=400_000)


@serve.deployment
class _Handles:
    """A root whose only use is to hand out the handles it was bound to."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def get(self) -> tuple[Any, ...]:
        return self._handles


@pytest.fixture(scope="session")
def long_context(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with room for long answers; read only."""
    return long_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="session")
def other_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like the tiny one, except for its weights."""
    from tests.tiny import build_reference_model, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "other-llava", build_reference_model(seed=1))


@pytest.fixture(scope="session")
def local_args(tiny_checkpoint: Path) -> AppArgs:
    encoder = VisionEncoderArgs(num_cpus=0.1, dtype="float32", device="cpu", threads=1)
    generator = GeneratorArgs(num_cpus=0.1, dtype="float32", device="cpu", threads=1)
    return AppArgs.model_validate(
        {
            "models": [{"checkpoint": str(tiny_checkpoint)}],
            "limits": LIMITS,
            "vision_encoder": encoder,
            "generator": generator,
        }
    )


@pytest.fixture(scope="session")
def local_stages(local_args: AppArgs) -> tuple[Any, ...]:
    """Handles of all three stages on the tiny checkpoint."""
    [name] = found = check_checkpoints(local_args)
    stages = bind_stages(local_args, found, share_towers(local_args, found), LocalHandoff())
    preprocessor, encoders, generators = (
        serve.run(_Handles.bind(*stages), _local_testing_mode=True).get.remote().result()
    )
    return preprocessor, encoders[name], generators[name]


@pytest.fixture(scope="session")
def local_pipeline(local_stages: tuple[Any, ...], local_args: AppArgs) -> Pipeline:
    """All three stages as one pipeline."""
    return Pipeline(*local_stages, LocalHandoff(), model=local_args.models[0].served_name)


@pytest.fixture(scope="session")
def local_client(local_pipeline: Pipeline, local_args: AppArgs) -> Iterator[TestClient]:
    """HTTP to the whole graph."""
    gateway = Gateway({local_args.models[0].served_name: local_pipeline}, all_ready, limits=local_args.limits)
    with TestClient(gateway.app) as client:
        yield client
