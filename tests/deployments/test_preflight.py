"""Checkpoints that cannot be served are found before anything starts."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.preflight import check_checkpoints, share_towers
from deployments.settings.app import AppArgs
from llava_core.checkpoints.files import DEFAULT_MODEL
from llava_core.checkpoints.found import FoundCheckpoint
from llava_core.errors import CheckpointError, UnknownNameError
from tests.hub import NEW, OLD, fill_cache, hub_of, use_cache, write_lora
from tests.tiny import cut_short, edit_json


def _args(checkpoint: object, *, offline: bool = False, **entry: Any) -> AppArgs:
    return AppArgs.model_validate({"models": [{"checkpoint": str(checkpoint), **entry}], "offline": offline})


def _check(checkpoint: object, *, offline: bool = False, **entry: Any) -> FoundCheckpoint:
    """Check a single model and return what was found."""
    [found] = check_checkpoints(_args(checkpoint, offline=offline, **entry)).values()
    return found


def test_a_valid_checkpoint_passes(tiny_checkpoint: Path) -> None:
    found = _check(tiny_checkpoint)
    assert found == FoundCheckpoint(str(tiny_checkpoint), None, {}, offline=False)
    assert found.open().folder == tiny_checkpoint


def test_it_reads_no_weights_and_imports_no_torch(tiny_checkpoint: Path) -> None:
    program = (
        "import sys; from deployments.preflight import *; from deployments.settings.app import AppArgs;"
        f"args = AppArgs(models=[{{'checkpoint': {str(tiny_checkpoint)!r}}}]);"
        "share_towers(args, check_checkpoints(args)); sys.exit('torch' in sys.modules)"
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


def test_an_unknown_prompt_template_is_refused(checkpoint_copy: Path) -> None:
    with pytest.raises(UnknownNameError, match="vicuna_v1"):
        _check(checkpoint_copy, template="nonsense")


def test_a_config_with_too_many_layers_is_detected(checkpoint_copy: Path) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config["text_config"].update(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="3 decoder layers, the files hold 2"):
        _check(checkpoint_copy)


def test_every_replica_uses_the_revisions_found_by_the_preflight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This covers adapter, base and tower, on this machine after all three have changed on the hub, and on another."""
    monkeypatch.chdir(tmp_path)
    repositories = {repo_id: {OLD: folder} for repo_id, folder in write_lora(tmp_path / "written").items()}
    with hub_of(repositories) as hub:
        use_cache(monkeypatch, tmp_path / "here", hub.url)
        found = pickle.loads(pickle.dumps(_check("owner/lora", template="vicuna_v1")))
        assert found.revisions == dict.fromkeys(repositories, OLD)
        for folders in repositories.values():
            folders[NEW] = folders[OLD]
        for machine in ("here", "there"):
            use_cache(monkeypatch, tmp_path / machine, hub.url)
            checkpoint = found.open()
            assert checkpoint.folder == tmp_path / machine / "models--owner--lora" / "snapshots" / OLD
            assert {each.folder.name for each in checkpoint.weights} == {OLD}
            assert len(checkpoint.weights) == 3
        assert not [path for path in hub.asked if NEW in path]


def test_revisions_can_be_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    for repo_id, folder in write_lora(tmp_path / "written").items():
        fill_cache(tmp_path / "cache", repo_id, {OLD: folder, NEW: folder})
    revisions = {"owner/lora": OLD, "owner/base": NEW, "openai/tower": OLD}
    assert _check("owner/lora", template="vicuna_v1", revisions=revisions).revisions == revisions
    with pytest.raises(CheckpointError, match=r"openai/tower, the mm_vision_tower of .*, is not among the revisions"):
        _check("owner/lora", revisions={"owner/lora": OLD, "owner/base": NEW})


def test_offline_the_hub_is_not_contacted_and_missing_parts_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = write_lora(tmp_path / "written")
    with hub_of({repo_id: {OLD: folder} for repo_id, folder in folders.items()}) as hub:
        use_cache(monkeypatch, tmp_path / "cache", hub.url)
        args = {"checkpoint": "owner/lora", "template": "vicuna_v1", "offline": True}
        with pytest.raises(CheckpointError, match=r"owner/lora, the model, is neither .* nothing may be fetched"):
            _check(**args)
        fill_cache(tmp_path / "cache", "owner/lora", {OLD: folders["owner/lora"]})
        missing = r"owner/base, the base of .*; openai/tower, the mm_vision_tower of .*, is neither"
        with pytest.raises(CheckpointError, match=missing):
            _check(**args)
        for repo_id in ("owner/base", "openai/tower"):
            fill_cache(tmp_path / "cache", repo_id, {OLD: folders[repo_id]})
        found = _check(**args)
        found.open()
        shutil.rmtree(tmp_path / "cache" / "models--openai--tower")
        with pytest.raises(CheckpointError, match=f"openai/tower at revision {OLD}, .* nothing may be fetched"):
            found.open()
        assert hub.asked == []


def _shared(*models: dict[str, Any]) -> dict[str, str]:
    args = AppArgs(models=models)
    return share_towers(args, check_checkpoints(args))


def test_towers_are_compared_by_their_weights_not_their_folders(
    tiny_checkpoint: Path, checkpoint_copy: Path, other_tower: Path
) -> None:
    a, b, c = (
        {"name": name, "checkpoint": str(folder)}
        for name, folder in zip("abc", (tiny_checkpoint, other_tower, checkpoint_copy), strict=True)
    )
    assert _shared(a, b, c) == {"a": "a", "b": "b", "c": "a"}
    assert _shared(c, a) == {"c": "c", "a": "c"}
    assert _shared(b) == {"b": "b"}


@pytest.mark.parametrize("own", [{"dtype": "bfloat16"}, {"num_cpus": 0.2}, {"cache_bytes": 0}])
def test_a_tower_with_other_settings_is_not_shared(own: dict[str, Any], tiny_checkpoint: Path) -> None:
    a, b = ({"name": name, "checkpoint": str(tiny_checkpoint)} for name in "ab")
    assert _shared(a, b) == {"a": "a", "b": "a"}
    assert _shared(a, b | {"vision_encoder": own}) == {"a": "a", "b": "b"}


def test_towers_with_different_configs_are_told_apart_without_torch(
    tiny_checkpoint: Path, checkpoint_copy: Path
) -> None:
    edit_json(checkpoint_copy / "config.json", lambda config: config.update(vision_feature_layer=-1))
    folders = [str(tiny_checkpoint), str(checkpoint_copy)]
    program = (
        "import sys; from deployments.preflight import *; from deployments.settings.app import AppArgs;"
        f"args = AppArgs(models=[{{'name': f[-3:], 'checkpoint': f}} for f in {folders!r}]);"
        "shared = share_towers(args, check_checkpoints(args));"
        "assert all(name == owner for name, owner in shared.items()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_the_default_model_is_found_in_each_machines_copy_of_the_project() -> None:
    [found] = check_checkpoints(AppArgs()).values()
    assert found.model is None
    assert found.open().folder == DEFAULT_MODEL
