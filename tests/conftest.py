"""Fixtures for all tests: a tiny checkpoint, the transformers model it was written from, copies to damage."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Of what is imported and collected nothing is garbage: looking for some takes a quarter of the time.
gc.disable()

# A busy machine is no failure, and hangs end by pytest's own timeout; every run tries the same examples.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# Before anything imports transformers: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before anything imports kernels: where there is no GPU, they run in Triton's interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def pytest_collection_finish() -> None:
    """Garbage is collected again, and nobody looks through what there is by now."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors only lose time to a second thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again(_one_thread: None) -> None:
    """What one test sets is that of threads which another begins, too: their sums would differ in the last bits from
    those of its own thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_model() -> "LlavaForConditionalGeneration":
    """What transformers computes; tests must not change it."""
    from tests.tiny import build_reference_model

    return build_reference_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(reference_model: "LlavaForConditionalGeneration", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the hub's layout; read only."""
    from tests.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llava", reference_model)


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint of this test's own, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def write_copy(reference_model: "LlavaForConditionalGeneration", tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny checkpoint in another form; takes the options of `write_checkpoint`."""
    from tests.tiny import write_checkpoint

    return lambda **options: write_checkpoint(tmp_path / "written", reference_model, **options)
