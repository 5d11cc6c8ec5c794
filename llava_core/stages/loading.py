"""Sets up the process of one stage and loads it: threads, device, and its own part of the checkpoint.

Shared by all callers that run stages in separate processes. Networks are imported inside the functions, so that a stage
without one never imports torch. Knows neither Ray nor the messages between stages.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from llava_core.errors import LlavaError
from llava_core.stages.cores import usable_cores
from llava_core.stages.shared_cores import Cores, OwnCores, SharedCores, shared_folder
from llava_core.types import Quantization

if TYPE_CHECKING:
    from torch import nn

    from llava_core.checkpoints.layout import Checkpoint
    from llava_core.checkpoints.load import Dtype, LoadOptions
    from llava_core.checkpoints.tokenizer import CheckpointTokenizer
    from llava_core.engine.config import EngineConfig
    from llava_core.engine.engine import Engine
    from llava_core.vision.towers import VisionTower

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
# Takes the name of a startup phase and returns the context manager to run the phase in.
Phase = Callable[[str], AbstractContextManager[None]]
# Operations of a network with fewer parameters are too short to be split among threads.
_MANY_PARAMETERS = 50_000_000

# Set in every computing process, unless the user has set it. torch reads it once, at import.
TORCH_ENVIRONMENT: Mapping[str, str] = {
    # Huge pages, from which a processor streams weights a tenth faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # oneDNN, and torch's cache in front of it, keep a kernel of hundreds of kilobytes for each of the last 1,024
    # shapes. Prompts have any number of tokens; a step needs six shapes.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}


class DeviceError(LlavaError):
    """A process cannot compute on the configured device."""


@dataclass(frozen=True)
class Compute:
    """Where and how a stage computes: `device` auto is the GPU where the process has been given one; `threads` None
    means all cores."""

    device: str = "auto"
    dtype: Dtype = "auto"
    threads: int | None = None
    quantization: Quantization | None = None


def _untimed(_: str) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def _keeping_all() -> Iterator[None]:
    """Suspend garbage collection. Imported modules are never garbage, and scanning those of torch and transformers over
    and over takes a tenth of their import time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_encoder(
    checkpoint: Checkpoint, compute: Compute, *, num_gpus: float, phase: Phase = _untimed
) -> tuple[VisionTower, Cores]:
    """Load the tower, ready for inference. It claims `Cores` itself when it computes; the caller must release them
    afterwards. The phases are `imports` and `weights`."""
    with phase("imports"), _keeping_all():
        options = set_up_compute(compute, num_gpus=num_gpus)
        from llava_core.checkpoints.load import load_tower
        from llava_core.vision.inference import call_before_layers, ready_tower

    with phase("weights"):
        tower = load_tower(checkpoint, options)
        cores = share_cores(compute, tower, options.device)
        ready_tower(tower)
        call_before_layers(tower, cores.claim)
    return tower, cores


def load_engine(
    checkpoint: Checkpoint, compute: Compute, config: EngineConfig, *, num_gpus: float, phase: Phase = _untimed
) -> tuple[Engine, CheckpointTokenizer, Cores]:
    """Load projector and decoder into an engine, with the tokenizer that it decodes with. The phases are `imports`,
    `weights` and `engine`."""
    with phase("imports"), _keeping_all():
        options = set_up_compute(compute, num_gpus=num_gpus)
        from llava_core.checkpoints.load import load_language_side
        from llava_core.checkpoints.tokenizer import load_tokenizer
        from llava_core.engine.engine import Engine
        from llava_core.models.fused import ready_language

    with phase("weights"):
        tokenizer = load_tokenizer(checkpoint)
        language = load_language_side(checkpoint, options, num_tokens=tokenizer.num_tokens)
        cores = share_cores(compute, language, options.device)
    with phase("engine"):
        ready_language(language)
        engine = Engine(language, tokenizer, config)
    return engine, tokenizer, cores


def in_thread_of_its_own(load: Callable[[], Loaded]) -> Loaded:
    """Run `load` in a short-lived thread; returns or raises what it does. A thread that has computed keeps OpenMP
    threads until it ends. Where two threads have some, these sleep between operations, and a step takes half as long
    again."""
    with ThreadPoolExecutor(1, "load") as thread:
        return thread.submit(load).result()


def set_up_compute(compute: Compute, *, num_gpus: float) -> LoadOptions:
    """Set the threads and choose the device of this process. The threads are set here because the parent process may
    have left it only one. `num_gpus` is the process's share of GPUs."""
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    from llava_core.checkpoints.load import LoadOptions

    threads = compute.threads or usable_cores()
    torch.set_num_threads(threads)
    options = LoadOptions(choose_device(compute.device, num_gpus=num_gpus), compute.dtype, compute.quantization)
    logger.info("computing on %s in %s with %d threads", options.device, options.torch_dtype, threads)
    return options


def share_cores(compute: Compute, network: nn.Module, device: str) -> Cores:
    """How this process shares its cores with others; with `threads` set explicitly, it does not adapt."""
    import torch

    num_cores = torch.get_num_threads()
    if compute.threads is not None or device != "cpu" or num_cores == 1:
        return OwnCores()
    num_parameters = sum(value.numel() for value in network.state_dict().values())
    if num_parameters < _MANY_PARAMETERS:
        torch.set_num_threads(1)
        logger.info("%d parameters: computing with one thread", num_parameters)
        return OwnCores()
    return SharedCores(shared_folder(), num_cores, torch.set_num_threads)


def choose_device(asked: str, *, num_gpus: float) -> str:
    """The device to use: for `auto`, the GPU that this process has been given, or the CPU if none.

    Raises DeviceError when a GPU is needed but there is no CUDA.
    """
    import torch

    device = asked if asked != "auto" else "cuda" if num_gpus else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {asked} with {num_gpus} GPUs from Ray calls for CUDA, and torch {torch.__version__} finds none; "
            "install torch for this GPU, or set num_gpus: 0 and device: cpu"
        )
    return device
