"""Hub ids to folders, with the hub's real client: downloads and their log lines, revisions, refusals."""

import logging
import shutil
from pathlib import Path

import pytest

from llava_core.checkpoints.hub import Hub
from llava_core.errors import CheckpointError
from tests.hub import NEW, OLD, fill_cache, hub_of, use_cache


def write(folder: Path, **files: str) -> Path:
    """Writes files; an underscore in a name stands for a dot."""
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
    # A folder here could be taken for an id, so change to a directory without such folders.
    monkeypatch.chdir(tmp_path)
    use_cache(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def test_a_local_folder_is_used_directly(tmp_path: Path) -> None:
    hub = Hub(revisions={})
    assert hub.find(str(tmp_path), "the model") == tmp_path
    assert hub.found == {}


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./missing", "~/missing-folder", "~nobody-here", "missing", "a/b/c", ""]
)
def test_names_that_are_neither_folder_nor_hub_id_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="the model: no such checkpoint folder"):
        Hub().find(name, "the model")


def test_an_unreadable_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(CheckpointError, match="cannot be read: permission denied"):
        Hub().find(str(tmp_path), "the model")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nobody/nothing", "owner name/no!thing"])
def test_an_id_that_is_not_cached_says_how_to_get_it(name: str) -> None:
    message = rf"{name}, the model, is neither a folder here nor .* nothing may be fetched; download it first"
    for hub in (Hub(offline=True), Hub()):
        with pytest.raises(CheckpointError, match=message):
            hub.find(name, "the model")


def test_downloads_are_logged_once_and_weights_fetched_once(
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


def test_weights_that_exist_only_as_bin_are_fetched(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_of({"owner/name": {OLD: write(tmp_path / "x", config_json="{}", model_bin="weights")}}) as server:
        use_cache(monkeypatch, cache, server.url)
        assert (Hub().find("owner/name", "the model") / "model.bin").exists()
    # Offline, the cached copy counts as complete although it has only one of the two weight formats.
    assert (Hub(offline=True).find("owner/name", "the model") / "model.bin").exists()


def test_a_partial_download_is_found_offline(old: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_of({"owner/name": {OLD: old}}) as server:
        use_cache(monkeypatch, cache, server.url)
        folder = Hub().find("owner/name", "the model")
        asked = len(server.asked)
        assert Hub(offline=True).find("owner/name", "the model") == folder
        assert len(server.asked) == asked


def test_an_unreachable_hub_falls_back_to_the_cache(
    old: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Holds for whichever HTTP client the hub's client is built on."""
    caplog.set_level(logging.INFO, "llava_core")
    fill_cache(cache, "owner/name", {OLD: old})
    use_cache(monkeypatch, cache, "http://127.0.0.1:9")
    assert Hub().find("owner/name", "the model").name == OLD
    assert "owner/name, the model: no answer from http://127.0.0.1:9 (ConnectError)" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"owner/other, the base, .* fetching it failed \(.*\); download it first"
    ):
        Hub().find("owner/other", "the base")


def test_a_revision_stays_pinned_once_found(old: Path, new: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {OLD: old}
    with hub_of({"owner/name": folders}) as server:
        use_cache(monkeypatch, cache, server.url)
        hub = Hub()
        first = hub.find("owner/name", "the model")
        folders[NEW] = new
        assert hub.find("owner/name", "the base") == first
        assert Hub().find("owner/name", "the model").name == NEW


def test_only_the_given_revisions_are_used(
    old: Path, new: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(cache, "owner/name", {OLD: old, NEW: new})
    fill_cache(cache, "owner/other", {NEW: new})
    assert Hub().find("owner/name", "the model").name == NEW
    hub = Hub(revisions={"owner/name": OLD, "owner/none": NEW})
    assert hub.find("owner/name", "the model").name == OLD
    # Not even a folder of that name takes precedence.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.find("owner/name", "the model").name == OLD
    with pytest.raises(CheckpointError, match="owner/other, the base, is not among the revisions to use; add"):
        hub.find("owner/other", "the base")
    with pytest.raises(CheckpointError, match=f"owner/none at revision {NEW}, the base, is neither"):
        hub.find("owner/none", "the base")
    assert hub.found == {"owner/name": OLD}
