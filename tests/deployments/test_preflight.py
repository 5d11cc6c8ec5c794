"""Checkpoints that cannot be served are found before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.preflight import FoundCheckpoint, check_checkpoint
from deployments.settings import AppArgs
from llava_core.errors import CheckpointError, UnknownNameError
from tests.tiny import cut_short, edit_json


def _check(folder: Path, **args: str) -> FoundCheckpoint:
    return check_checkpoint(AppArgs(model=str(folder), **args))  # type: ignore[arg-type]


def test_a_good_checkpoint_passes(tiny_checkpoint: Path) -> None:
    assert _check(tiny_checkpoint) == FoundCheckpoint(str(tiny_checkpoint), tiny_checkpoint)


def test_it_reads_no_weights_and_imports_no_torch(tiny_checkpoint: Path) -> None:
    program = (
        "import sys; from deployments.preflight import check_checkpoint; from deployments.settings import AppArgs;"
        f"check_checkpoint(AppArgs(model={str(tiny_checkpoint)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, checkpoint_copy: Path) -> None:
    (checkpoint_copy / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        _check(checkpoint_copy)


def test_a_truncated_file_is_named(checkpoint_copy: Path) -> None:
    weights = checkpoint_copy / "model.safetensors"
    cut_short(weights, keep=weights.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        _check(checkpoint_copy)


def test_a_prompt_format_that_is_not_known_is_refused(checkpoint_copy: Path) -> None:
    with pytest.raises(UnknownNameError, match="vicuna_v1"):
        _check(checkpoint_copy, template="nonsense")


def test_more_layers_than_there_are_is_noticed(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="3 decoder layers, the files hold 2"):
        _check(checkpoint_copy)


def test_a_machine_without_the_folder_uses_the_same_revision_or_none(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FoundCheckpoint("owner/name", Path("/elsewhere/snapshots/abc"))
    for revision in ("abc", "def"):
        (tmp_path / revision).mkdir()
    monkeypatch.setattr("deployments.preflight.resolve_checkpoint", lambda _: tmp_path / "abc")
    assert found.here() == tmp_path / "abc"
    monkeypatch.setattr("deployments.preflight.resolve_checkpoint", lambda _: tmp_path / "def")
    with pytest.raises(CheckpointError, match="owner/name is at revision def here and at abc"):
        found.here()
    assert FoundCheckpoint("x", tiny_checkpoint).here() == tiny_checkpoint
