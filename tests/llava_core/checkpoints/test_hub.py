"""Ids to folders, by the real client of the hub: what is fetched and said, which revision it is, what is refused."""

import logging
import shutil
from pathlib import Path

import pytest

from llava_core.checkpoints.hub import Hub
from llava_core.errors import CheckpointError
from tests.hub import NEW, OLD, fill_cache, hub_of, use_cache


def write(folder: Path, **files: str) -> Path:
    """Files named with underscores for dots."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write(tmp_path / "old", config_json="{}", model_safetensors="weights", model_bin="the same", README_md="old")


@pytest.fixture
def new(tmp_path: Path, old: Path) -> Path:
    folder = Path(shutil.copytree(old, tmp_path / "new"))
    (folder / "config.json").write_text('{"new": 1}')
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Where nothing is a folder that could be taken for an id.
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_folder_is_found_as_it_is(tmp_path: Path) -> None:
    hub = Hub(revisions={})
    assert hub.find(str(tmp_path), "the model") == tmp_path
    assert hub.found == {}


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./missing", "~/missing-folder", "~nobody-here", "missing", "a/b/c", ""]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="the model: no such checkpoint folder"):
        Hub().find(name, "the model")


def test_a_folder_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(CheckpointError, match="cannot be read: permission denied"):
        Hub().find(str(tmp_path), "the model")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nobody/nothing", "owner name/no!thing"])
def test_an_id_that_is_not_here_says_what_to_do(name: str) -> None:
    message = rf"{name}, the model, is neither a folder here nor .* nothing may be fetched; download it first"
    for hub in (Hub(offline=True), Hub()):
        with pytest.raises(CheckpointError, match=message):
            hub.find(name, "the model")


def test_what_is_fetched_is_announced_once_and_weights_are_fetched_once(
    old: Path, new: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llava_core")
    with hub_of({"owner/name": {OLD: old}}) as first:
        use_cache(monkeypatch, cache, first.url)
        hub = Hub()
        folder = hub.find("owner/name", "the tower of x")
        assert (folder.name, hub.found) == (OLD, {"owner/name": OLD})
        assert Hub().find("owner/name", "the model") == folder
        assert first.sent == ["config.json", "model.safetensors"]
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("llava_core")]
    assert line == (f"owner/name, the tower of x: downloading 2 files (0.00 GB) of revision {OLD} from {first.url}")
    with hub_of({"owner/name": {OLD: old, NEW: new}}) as second:
        use_cache(monkeypatch, cache, second.url)
        assert (Hub().find("owner/name", "the model") / "config.json").read_text() == '{"new": 1}'
        assert second.sent == ["config.json"]
    assert f"downloading 1 files (0.00 GB) of revision {NEW}" in caplog.text


def test_weights_that_are_there_as_bin_alone_are_fetched(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of({"owner/name": {OLD: write(tmp_path / "x", config_json="{}", model_bin="weights")}}) as server:
        use_cache(monkeypatch, cache, server.url)
        assert (Hub().find("owner/name", "the model") / "model.bin").exists()
    # Both forms were listed when one of them was fetched: what is here is whole all the same.
    assert (Hub(offline=True).find("owner/name", "the model") / "model.bin").exists()


def test_what_was_fetched_is_found_offline_although_the_hub_has_more(
    old: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of({"owner/name": {OLD: old}}) as server:
        use_cache(monkeypatch, cache, server.url)
        folder = Hub().find("owner/name", "the model")
        asked = len(server.asked)
        assert Hub(offline=True).find("owner/name", "the model") == folder
        assert len(server.asked) == asked


def test_a_hub_that_is_not_there_leaves_the_cache(
    old: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever HTTP client the hub's is built on."""
    caplog.set_level(logging.INFO, "llava_core")
    fill_cache(cache, "owner/name", {OLD: old})
    use_cache(monkeypatch, cache, "http://127.0.0.1:9")
    assert Hub().find("owner/name", "the model").name == OLD
    assert "owner/name, the model: no answer from http://127.0.0.1:9 (ConnectError)" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"owner/other, the base, .* fetching it failed \(.*\); download it first"
    ):
        Hub().find("owner/other", "the base")


def test_a_revision_stays_what_it_was_at_first(
    old: Path, new: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {OLD: old}
    with hub_of({"owner/name": folders}) as server:
        use_cache(monkeypatch, cache, server.url)
        hub = Hub()
        first = hub.find("owner/name", "the model")
        folders[NEW] = new
        assert hub.find("owner/name", "the base") == first
        assert Hub().find("owner/name", "the model").name == NEW


def test_with_revisions_it_is_those_and_no_other(
    old: Path, new: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(cache, "owner/name", {OLD: old, NEW: new})
    fill_cache(cache, "owner/other", {NEW: new})
    assert Hub().find("owner/name", "the model").name == NEW
    hub = Hub(revisions={"owner/name": OLD, "owner/none": NEW})
    assert hub.find("owner/name", "the model").name == OLD
    # Not even a folder of that name.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.find("owner/name", "the model").name == OLD
    with pytest.raises(CheckpointError, match="owner/other, the base, is not among the revisions to use; add"):
        hub.find("owner/other", "the base")
    with pytest.raises(CheckpointError, match=f"owner/none at revision {NEW}, the base, is neither"):
        hub.find("owner/none", "the base")
    assert hub.found == {"owner/name": OLD}
