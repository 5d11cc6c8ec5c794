"""What replicas do when they start: threads, device, logging, and their own part of the checkpoint."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deployments import replicas
from deployments.exposure import ENTRANCE_VARIABLE, ExposureError
from deployments.handoff import LocalHandoff
from deployments.preflight import FoundCheckpoint
from deployments.replicas import (
    DeviceError,
    GatewayReplica,
    PreprocessorReplica,
    VisionEncoderReplica,
    adopt_serve_logging,
    choose_device,
    in_thread_of_its_own,
    set_up_compute,
    share_cores,
)
from deployments.settings import AppArgs
from deployments.shared_cores import OwnCores, SharedCores
from deployments.stage_settings import ComputeArgs, VisionEncoderArgs
from llava_core.errors import CheckpointError
from tests.tiny import edit_json


@pytest.fixture(autouse=True)
def _restore_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("proxy", "entrance"), [("0.0.0.0", None), ("127.64.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")]
)
def test_a_gateway_that_others_reach_without_keys_does_not_start(
    proxy: str, entrance: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has started Serve or deployed this, on whichever host, and whatever stands in front of it."""
    client = SimpleNamespace(http_config=SimpleNamespace(host=proxy))
    monkeypatch.setattr(replicas, "_get_global_client", lambda: client)
    monkeypatch.delenv(ENTRANCE_VARIABLE, raising=False)
    if entrance is not None:
        monkeypatch.setenv(ENTRANCE_VARIABLE, entrance)
    with pytest.raises(ExposureError, match="allow_anyone"):
        GatewayReplica(AppArgs(), object(), {}, {}, LocalHandoff())  # type: ignore[arg-type]


def test_threads_are_what_was_asked_for_whatever_the_cpu_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_up_compute(ComputeArgs(num_cpus=0.1, threads=2))
    assert torch.get_num_threads() == 2


def test_threads_and_device_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "deployments"):
        options = set_up_compute(ComputeArgs(threads=1, device="cpu", dtype="float32"))
    assert (options.device, options.dtype) == ("cpu", "float32")
    assert "on cpu in torch.float32 with 1 threads" in caplog.text


PROMPTS_OF_ALL_LENGTHS = """
import resource
from deployments.replicas import set_up_compute
from deployments.stage_settings import ComputeArgs
set_up_compute(ComputeArgs(threads=1, device="cpu"))
import torch
from llava_core.kernels.packed import PackedLinear
with torch.inference_mode():
    layers = [PackedLinear(torch.nn.Linear(192, size).bfloat16()) for size in (192, 320, 576, 1024)]
    for rows in range(1, 40):
        [layer(torch.zeros(rows, 192, dtype=torch.bfloat16)) for layer in layers]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in range(40, 240):
        [layer(torch.zeros(rows, 192, dtype=torch.bfloat16)) for layer in layers]
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no kernels for bfloat16")
def test_memory_does_not_grow_with_every_length_that_a_prompt_can_have() -> None:
    command = [sys.executable, "-c", PROMPTS_OF_ALL_LENGTHS]
    grown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert int(grown) < 60, "MiB"


def test_what_loads_leaves_no_thread_behind_and_its_error_comes_through() -> None:
    before = threading.enumerate()
    assert in_thread_of_its_own(lambda: threading.current_thread() not in before)
    assert threading.enumerate() == before
    with pytest.raises(CheckpointError, match="damaged"):
        in_thread_of_its_own(lambda: (_ for _ in ()).throw(CheckpointError("damaged")))


@pytest.mark.parametrize(
    ("settings", "device", "width", "expected"),
    [
        ({}, "cpu", 8000, SharedCores),
        ({}, "cpu", 8, OwnCores),
        ({"threads": 2}, "cpu", 8000, OwnCores),
        ({}, "cuda", 8000, OwnCores),
    ],
)
def test_cores_are_shared_by_large_networks_whose_threads_are_not_set(
    settings: dict[str, int],
    device: str,
    width: int,
    expected: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.replicas.shared_folder", lambda: tmp_path)
    torch.set_num_threads(2)
    cores = share_cores(ComputeArgs(**settings), torch.nn.Linear(width, width, device="meta"), device)
    assert type(cores) is expected
    # A small network's operations are too short to be divided.
    assert torch.get_num_threads() == (1 if width == 8 and device == "cpu" else 2)
    if isinstance(cores, SharedCores):
        cores.close()


def test_our_records_go_where_serves_go() -> None:
    serve_logger = logging.getLogger("ray.serve")
    adopt_serve_logging()
    assert logging.getLogger("deployments").handlers == serve_logger.handlers
    assert logging.getLogger("llava_core").level == logging.INFO


def test_a_replica_reads_its_own_part_only(checkpoint_copy: Path) -> None:
    (checkpoint_copy / "model.safetensors").unlink()
    found = FoundCheckpoint(str(checkpoint_copy), None, {}, offline=True)
    PreprocessorReplica(AppArgs(), {"scenes-llava": found})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        VisionEncoderReplica(VisionEncoderArgs(), found, LocalHandoff())


def test_caches_are_as_large_as_the_settings_say(tiny_checkpoint: Path) -> None:
    args = AppArgs.model_validate({"preprocessor": {"cache_bytes": 11}, "vision_encoder": {"cache_bytes": 12}})
    found = FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=True)
    [preparer] = PreprocessorReplica(args, {"scenes-llava": found})._preparers.values()
    assert preparer.cache.max_bytes == 11
    assert VisionEncoderReplica(args.models[0].vision_encoder, found, LocalHandoff()).cache.max_bytes == 12


def test_all_models_keep_their_tiles_in_one_cache(tiny_checkpoint: Path, checkpoint_copy: Path) -> None:
    folders = {"a": tiny_checkpoint, "b": checkpoint_copy}
    args = AppArgs.model_validate({"models": [{"name": "a", "template": "v0"}, {"name": "b"}]})
    found = {name: FoundCheckpoint(str(folder), None, {}, offline=True) for name, folder in folders.items()}
    preparers = PreprocessorReplica(args, found)._preparers
    assert {name: preparer.template.name for name, preparer in preparers.items()} == {"a": "v0", "b": "vicuna_v1"}
    assert preparers["a"].cache is preparers["b"].cache


def test_a_wrong_shape_is_found_where_it_is_loaded(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["vision_config"].update(intermediate_size=48))
    found = FoundCheckpoint(str(checkpoint_copy), None, {}, offline=True)
    with pytest.raises(CheckpointError, match="tower tensor"):
        VisionEncoderReplica(VisionEncoderArgs(), found, LocalHandoff())


def test_auto_is_the_gpu_that_ray_has_given_and_never_one_that_is_merely_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device("auto", num_gpus=0) == "cpu"
    assert choose_device("auto", num_gpus=1) == "cuda"
    assert choose_device("cuda:1", num_gpus=0) == "cuda:1"
    assert choose_device("cpu", num_gpus=1) == "cpu"


@pytest.mark.parametrize(("asked", "num_gpus"), [("auto", 1), ("cuda", 0), ("cuda:0", 1)])
def test_a_gpu_that_torch_cannot_use_ends_the_start(asked: str, num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="calls for CUDA"):
        choose_device(asked, num_gpus=num_gpus)


def test_ray_is_asked_which_gpus_it_has_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for gpus, device in (([], "cpu"), ([1], "cuda")):
        monkeypatch.setattr("ray.get_gpu_ids", lambda gpus=gpus: gpus)
        assert set_up_compute(ComputeArgs(threads=1, dtype="float32")).device == device
