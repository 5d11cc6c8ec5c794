"""What replicas do when they start: threads, device, logging, and their own part of the checkpoint."""

import logging
from pathlib import Path

import pytest
import torch

from deployments.replicas import PreprocessorReplica, VisionEncoderReplica, adopt_serve_logging, set_up_compute
from deployments.settings import AppArgs, ComputeArgs
from llava_core.errors import CheckpointError
from tests.tiny import edit_json


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_threads_are_what_was_asked_for_whatever_the_cpu_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_up_compute(ComputeArgs(num_cpus=0.1, threads=2))
    assert torch.get_num_threads() == 2


def test_threads_and_device_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "deployments"):
        options = set_up_compute(ComputeArgs(threads=1, device="cpu", dtype="float32"))
    assert (options.device, options.dtype) == ("cpu", "float32")
    assert "on cpu in torch.float32 with 1 threads" in caplog.text


def test_our_records_go_where_serves_go() -> None:
    serve_logger = logging.getLogger("ray.serve")
    adopt_serve_logging()
    assert logging.getLogger("deployments").handlers == serve_logger.handlers
    assert logging.getLogger("llava_core").level == logging.INFO


def test_a_replica_reads_its_own_part_only(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").unlink()
    args = AppArgs(model=str(checkpoint_copy))
    PreprocessorReplica(args)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        VisionEncoderReplica(args, None)  # type: ignore[arg-type]


def test_a_wrong_shape_is_found_where_it_is_loaded(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["vision_config"].update(intermediate_size=48))
    with pytest.raises(CheckpointError, match="tower tensor"):
        VisionEncoderReplica(AppArgs(model=str(checkpoint_copy)), None)  # type: ignore[arg-type]
