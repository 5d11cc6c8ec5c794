"""The start of replicas: logging, and loading their own part of the checkpoint."""

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.replica import Replica

from deployments import replicas
from deployments.access.exposure import ENTRANCE_VARIABLE, ExposureError
from deployments.graph.handoff import LocalHandoff
from deployments.replicas import (
    GatewayReplica,
    PreprocessorReplica,
    VisionEncoderReplica,
    adopt_serve_logging,
    num_gpus,
)
from deployments.settings.app import AppArgs
from deployments.settings.stages import VisionEncoderArgs
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.errors import CheckpointError
from tests.tiny import edit_json


@pytest.mark.parametrize(
    ("proxy", "entrance"), [("0.0.0.0", None), ("127.64.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")]
)
def test_an_exposed_gateway_without_keys_does_not_start(
    proxy: str, entrance: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds however Serve was started or the application deployed, on any host, behind any proxy."""
    client = SimpleNamespace(http_config=SimpleNamespace(host=proxy))
    monkeypatch.setattr(replicas, "_get_global_client", lambda: client)
    monkeypatch.delenv(ENTRANCE_VARIABLE, raising=False)
    if entrance is not None:
        monkeypatch.setenv(ENTRANCE_VARIABLE, entrance)
    with pytest.raises(ExposureError, match="allow_anyone"):
        GatewayReplica(AppArgs(), object(), {}, {}, LocalHandoff())  # type: ignore[arg-type]


def test_our_log_records_go_to_serves_handlers() -> None:
    serve_logger = logging.getLogger("ray.serve")
    adopt_serve_logging()
    assert logging.getLogger("deployments").handlers == serve_logger.handlers
    assert logging.getLogger("llava_core").level == logging.INFO


def test_a_busy_replica_is_no_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is rejected by Serve's own code."""
    busy: Any = SimpleNamespace(
        _is_replica_quiescing=lambda _: False,
        _can_accept_request=lambda _: False,
        max_ongoing_requests=7,
        get_num_ongoing_requests=lambda: 7,
    )

    async def rejected() -> bool:
        call: Any = SimpleNamespace(request_id="id")
        [info] = [info async for info in Replica.handle_request_with_rejection(busy, call)]
        return not info.accepted

    serve_logger = logging.getLogger("ray.serve")
    with monkeypatch.context() as patch:
        patch.setattr(serve_logger, "filters", [])
        patch.setattr(serve_logger, "handlers", [caplog.handler])
        assert asyncio.run(rejected())
        assert "at capacity" in caplog.text
        caplog.clear()
        adopt_serve_logging()
        assert asyncio.run(rejected())
        serve_logger.warning("Replica %s is at its end.", "x")
    # Our loggers have the handlers from before again.
    adopt_serve_logging()
    assert [record.getMessage() for record in caplog.records] == ["Replica x is at its end."]


def test_a_replica_reads_only_its_own_part_of_a_checkpoint(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").unlink()
    found = FoundCheckpoint(str(checkpoint_copy), None, {}, offline=True)
    PreprocessorReplica(AppArgs(), {"scenes-llava": found})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        VisionEncoderReplica(VisionEncoderArgs(), found, LocalHandoff())


def test_cache_sizes_come_from_the_settings(tiny_checkpoint: Path) -> None:
    args = AppArgs.model_validate({"preprocessor": {"cache_bytes": 11}, "vision_encoder": {"cache_bytes": 12}})
    found = FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=True)
    [preparer] = PreprocessorReplica(args, {"scenes-llava": found})._preparers.values()
    assert preparer.cache.max_bytes == 11
    assert VisionEncoderReplica(args.models[0].vision_encoder, found, LocalHandoff()).cache.max_bytes == 12


def test_all_models_share_one_tile_cache(tiny_checkpoint: Path, checkpoint_copy: Path) -> None:
    folders = {"a": tiny_checkpoint, "b": checkpoint_copy}
    args = AppArgs.model_validate({"models": [{"name": "a", "template": "v0"}, {"name": "b"}]})
    found = {name: FoundCheckpoint(str(folder), None, {}, offline=True) for name, folder in folders.items()}
    preparers = PreprocessorReplica(args, found)._preparers
    assert {name: preparer.template.name for name, preparer in preparers.items()} == {"a": "v0", "b": "vicuna_v1"}
    assert preparers["a"].cache is preparers["b"].cache


def test_a_wrong_tensor_shape_is_detected_on_loading(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["vision_config"].update(intermediate_size=48))
    found = FoundCheckpoint(str(checkpoint_copy), None, {}, offline=True)
    with pytest.raises(CheckpointError, match="tower tensor"):
        VisionEncoderReplica(VisionEncoderArgs(), found, LocalHandoff())


def test_the_number_of_gpus_is_that_assigned_by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    for gpus in ([], [1], [0, 1]):
        monkeypatch.setattr("ray.get_gpu_ids", lambda gpus=gpus: gpus)
        assert num_gpus() == len(gpus)
