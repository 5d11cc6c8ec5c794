"""Towers by name: every valid form of a name, and every way it can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava_core.checkpoints.hub import Hub
from llava_core.checkpoints.towers import BIOVIL_FILE, KNOWN_TOWERS, check_biovil, find_biovil_file, find_tower
from llava_core.errors import CheckpointError
from llava_core.vision.biovil_keys import tensor_names
from tests.hub import fill_cache, use_cache
from tests.original import TOWER_CONFIG


def write_tower(folder: Path, config: dict[str, Any], *, weights: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").mkdir()
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["{root}/tower", "../tower", "tower", "/moved/from/elsewhere/tower"])
def test_a_folder_is_found_by_any_form_of_its_name(tmp_path: Path, checkpoint: Path, name: str) -> None:
    folder = write_tower(tmp_path / "tower", TOWER_CONFIG)
    source = find_tower(name.format(root=tmp_path), checkpoint, is_inside=False, hub=Hub(offline=True))
    assert source.config["image_size"] == 28
    assert source.folder is not None
    assert source.folder.resolve() == folder


def test_the_vision_half_of_a_whole_clip_is_read(tmp_path: Path, checkpoint: Path) -> None:
    write_tower(tmp_path / "tower", {"model_type": "clip", "hidden_size": 5, "vision_config": {"hidden_size": 24}})
    config = find_tower("tower", checkpoint, is_inside=False, hub=Hub(offline=True)).config
    assert (config["hidden_size"], config["model_type"]) == (24, "clip_vision_model")


@pytest.mark.parametrize("name", sorted(KNOWN_TOWERS))
@pytest.mark.parametrize("is_begun", [False, True])
def test_known_towers_need_no_files_if_the_checkpoint_holds_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path, name: str, *, is_begun: bool
) -> None:
    """Not even if a download was started and has not yet fetched config.json."""
    use_cache(monkeypatch, tmp_path / "cache")
    if is_begun:
        (tmp_path / "begun").mkdir()
        fill_cache(tmp_path / "cache", name, {"a" * 40: tmp_path / "begun"})
    hub = Hub(offline=True)
    source = find_tower(name, checkpoint, is_inside=True, hub=hub)
    assert (source.config, source.folder) == (KNOWN_TOWERS[name], None)
    # Every other replica does without them too.
    assert hub.found == {}
    assert find_tower(name, checkpoint, is_inside=True, hub=Hub(offline=True, revisions=hub.found)) == source


def test_a_cached_known_tower_is_the_same_for_every_replica(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path
) -> None:
    use_cache(monkeypatch, tmp_path / "cache")
    name, revision = "openai/clip-vit-large-patch14", "a" * 40
    here = write_tower(tmp_path / "here", {**TOWER_CONFIG, "hidden_act": "gelu"}, weights=False)
    fill_cache(tmp_path / "cache", name, {revision: here})
    hub = Hub()
    source = find_tower(name, checkpoint, is_inside=True, hub=hub)
    assert source.config["hidden_act"] == "gelu"
    assert hub.found == {name: revision}
    assert find_tower(name, checkpoint, is_inside=True, hub=Hub(revisions=hub.found)) == source
    # If the replica that chose the revisions had no tower, no other replica looks for one.
    assert find_tower(name, checkpoint, is_inside=True, hub=Hub(revisions={})).folder is None


@pytest.mark.parametrize("name", ["/no/such/tower", "tower", "nobody/nothing", "biovil_t"])
def test_an_unknown_tower_is_named_with_its_field(checkpoint: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: mm_vision_tower '{name}' is unknown"):
        find_tower(name, checkpoint, is_inside=False, hub=Hub())


def test_a_missing_tower_is_named_with_its_field(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"openai/none, the mm_vision_tower of .*/config\.json, is neither"):
        find_tower("openai/none", checkpoint, is_inside=False, hub=Hub(offline=True))


def test_a_folder_of_unknown_kind_is_named_with_the_known_kinds(tmp_path: Path, checkpoint: Path) -> None:
    write_tower(tmp_path / "tower", {"model_type": "vit"})
    with pytest.raises(
        CheckpointError, match=r"tower/config\.json: model_type 'vit' is not a known tower; known are clip"
    ):
        find_tower("tower", checkpoint, is_inside=False, hub=Hub(offline=True))


def test_a_tower_without_weights_is_named(tmp_path: Path, checkpoint: Path) -> None:
    write_tower(tmp_path / "tower", TOWER_CONFIG, weights=False)
    with pytest.raises(CheckpointError, match="holds no weights"):
        find_tower("tower", checkpoint, is_inside=False, hub=Hub(offline=True))


def test_an_incomplete_biovil_is_named_with_what_to_do(checkpoint: Path) -> None:
    check_biovil(checkpoint, tensor_names())
    message = rf"{checkpoint}/config\.json.* 1 tensors are missing: encoder\.missing_previous_emb, .*put {BIOVIL_FILE}"
    with pytest.raises(CheckpointError, match=message):
        check_biovil(checkpoint, tensor_names() - {"model.missing_prior"})


def test_the_released_biovil_is_found_inside_and_beside_the_checkpoint(checkpoint: Path) -> None:
    assert find_biovil_file(checkpoint) is None
    for folder in (checkpoint.parent, checkpoint):
        (folder / BIOVIL_FILE).touch()
        assert find_biovil_file(checkpoint) == folder / BIOVIL_FILE
