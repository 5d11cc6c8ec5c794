"""Builds modules with random weights on their device, and measures time on a device that computes asynchronously."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def build(make: Callable[[], Module], device: torch.device, dtype: torch.dtype) -> Module:
    """Build a module without a copy in another precision or on another device, which would not fit for 7 billion
    parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().to(device, dtype).eval()
    finally:
        torch.set_default_dtype(before)


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median time of one run, after a warm-up run."""
    seconds = []
    for _ in range(repeats + 1):
        wait_for(device)
        began = time.perf_counter()
        run()
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free memory that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
