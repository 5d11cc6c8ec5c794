"""What a stage's process sets up: threads, device, its share of the cores; it loads only its own part of the model."""

import gc
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.engine.config import EngineConfig
from llava_core.errors import CheckpointError
from llava_core.stages.loading import (
    Compute,
    DeviceError,
    choose_device,
    in_thread_of_its_own,
    load_encoder,
    load_engine,
    set_up_compute,
    share_cores,
)
from llava_core.stages.shared_cores import OwnCores, SharedCores


def test_the_requested_threads_override_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_up_compute(Compute(threads=2), num_gpus=0)
    assert torch.get_num_threads() == 2


def test_threads_and_device_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llava_core"):
        options = set_up_compute(Compute(threads=1, device="cpu", dtype="float32"), num_gpus=0)
    assert (options.device, options.dtype) == ("cpu", "float32")
    assert "on cpu in torch.float32 with 1 threads" in caplog.text


PROMPTS_OF_ALL_LENGTHS = """
import resource
from llava_core.stages.loading import Compute, set_up_compute
set_up_compute(Compute(threads=1, device="cpu"), num_gpus=0)
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
def test_memory_does_not_grow_with_the_number_of_prompt_lengths() -> None:
    command = [sys.executable, "-c", PROMPTS_OF_ALL_LENGTHS]
    grown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert int(grown) < 60, "MiB"


def test_a_loading_thread_ends_and_its_error_is_raised() -> None:
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
def test_only_large_networks_without_set_threads_share_cores(
    settings: dict[str, Any],
    device: str,
    width: int,
    expected: type,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llava_core.stages.loading.shared_folder", lambda: tmp_path)
    torch.set_num_threads(2)
    cores = share_cores(Compute(**settings), torch.nn.Linear(width, width, device="meta"), device)
    assert type(cores) is expected
    # A small network's operations are too short to be split among threads.
    assert torch.get_num_threads() == (1 if width == 8 and device == "cpu" else 2)
    if isinstance(cores, SharedCores):
        cores.close()


def test_auto_uses_a_gpu_only_if_ray_assigned_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_device("auto", num_gpus=0) == "cpu"
    assert choose_device("auto", num_gpus=1) == "cuda"
    assert choose_device("cuda:1", num_gpus=0) == "cuda:1"
    assert choose_device("cpu", num_gpus=1) == "cpu"


@pytest.mark.parametrize(("asked", "num_gpus"), [("auto", 1), ("cuda", 0), ("cuda:0", 1)])
def test_a_gpu_that_torch_cannot_use_is_an_error(asked: str, num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="calls for CUDA"):
        choose_device(asked, num_gpus=num_gpus)


def test_each_stage_loads_its_own_part_with_its_own_settings(tiny_checkpoint: Path) -> None:
    checkpoint = FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=True).open()
    tower, _ = load_encoder(checkpoint, Compute("cpu", "float32", 1), num_gpus=0)
    assert next(tower.parameters()).dtype == torch.float32
    engine, tokenizer, _ = load_engine(
        checkpoint, Compute("cpu", "bfloat16", 1), EngineConfig(max_running=3), num_gpus=0
    )
    assert engine.config.max_running == 3
    assert engine.model.decoder.dtype == torch.bfloat16
    assert tokenizer.num_tokens == checkpoint.config.vocab_size


def test_garbage_collection_resumes_after_a_failed_load(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    were_collecting: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        were_collecting.append(gc.isenabled())
        raise DeviceError("no device")

    checkpoint = FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=True).open()
    monkeypatch.setattr("llava_core.stages.loading.set_up_compute", fail)
    with pytest.raises(DeviceError):
        load_encoder(checkpoint, Compute(), num_gpus=0)
    assert were_collecting == [False]
    assert gc.isenabled()
