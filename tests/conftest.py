"""Fixtures for all tests: a tiny checkpoint, the transformers model it was written from, and copies to damage."""

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# Importing and collecting tests produces no garbage: searching for some would take a quarter of the time.
gc.disable()

# No deadlines: a busy machine is not a failure, and pytest's own timeout ends hangs. Every run tries the same examples.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

# Set before anything imports transformers: no test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Set before anything imports kernels: without a GPU they run in Triton's interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def pytest_collection_finish() -> None:
    """Enable garbage collection again, but exempt all objects created so far."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors only lose time to a second thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again(_one_thread: None) -> None:
    """Reset what a test may have set: threads that a later test starts would inherit it, and their sums would differ in
    the last bits from those of the test's own thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_model() -> "LlavaForConditionalGeneration":
    """The reference model of transformers; tests must not change it."""
    from tests.tiny import build_reference_model

    return build_reference_model()


@pytest.fixture(scope="session")
def tiny_checkpoint(reference_model: "LlavaForConditionalGeneration", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the hub's layout; read only."""
    from tests.tiny import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llava", reference_model)


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def write_copy(reference_model: "LlavaForConditionalGeneration", tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny checkpoint in another form; takes the options of `write_checkpoint`."""
    from tests.tiny import write_checkpoint

    return lambda **options: write_checkpoint(tmp_path / "written", reference_model, **options)
