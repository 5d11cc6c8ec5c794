"""Everything that is checked before Ray starts."""

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.access.exposure import ExposureError
from deployments.errors import KeysFileError, LaunchError
from deployments.preflight import check_checkpoints
from deployments.settings.app import AppArgs
from llava_core.errors import CheckpointError
from tests.deployments.launch.plans import add_application, planned, write_application
from tests.hub import NEW, OLD, hub_of, use_cache, write_lora
from tests.original import Kind, write_original


def test_without_a_configuration_there_are_defaults(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = planned(model=str(tiny_checkpoint))
    assert [model.source for model in plan.args.models] == [str(tiny_checkpoint)]
    assert plan.url == f"http://127.0.0.1:{plan.port}"
    assert plan.config["http_options"] == {"host": "127.0.0.1", "port": plan.port}


def test_options_override_the_configuration(tiny_checkpoint: Path, tmp_path: Path) -> None:
    models = [{"checkpoint": "/somewhere/else", "engine": {"max_running": 4}}, {"checkpoint": "/nowhere"}]
    args = {"models": models, "engine": {"max_running": 3}, "auth": {"allow_anyone": True}}
    plan = planned(write_application(tmp_path / "c.yaml", args=args), model=str(tiny_checkpoint), host="0.0.0.0")
    # It replaces all models, with the settings for all models and none of other models.
    [model] = plan.config["applications"][0]["args"]["models"]
    assert model["checkpoint"] == str(tiny_checkpoint)
    assert plan.args.models[0].engine.max_running == 3
    assert plan.config["http_options"]["host"] == "0.0.0.0"
    assert plan.url.startswith("http://127.0.0.1:")


def test_a_relative_model_becomes_absolute_and_keeps_its_name(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    plan = planned(model=tiny_checkpoint.name)
    [model] = plan.config["applications"][0]["args"]["models"]
    assert (model["checkpoint"], model["name"]) == (str(tiny_checkpoint), tiny_checkpoint.name)


def test_a_base_is_found_too_and_not_applied_to_another_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_original(tmp_path, Kind(layout="projector", tower_inside=True))
    assert original.base is not None
    monkeypatch.chdir(original.base.parent)
    plan = planned(model=str(original.folder), base=original.base.name)
    assert plan.config["applications"][0]["args"]["models"][0]["base"] == str(original.base)
    stated = write_application(
        tmp_path / "c.yaml", args={"models": [{"checkpoint": str(original.folder), "base": str(original.base)}]}
    )
    assert planned(stated).args.models[0].base == str(original.base)
    assert planned(stated, model=str(tiny_checkpoint)).args.models[0].base is None
    unsaid = write_application(
        tmp_path / "d.yaml", args={"models": [{"name": "mine", "checkpoint": str(original.folder)}]}
    )
    [model] = planned(unsaid, base=str(original.base)).args.models
    assert (model.name, model.base) == ("mine", str(original.base))


def test_a_base_option_is_refused_with_several_models(tmp_path: Path) -> None:
    config = write_application(tmp_path / "c.yaml", args={"models": [{"name": "a"}, {"name": "b"}]})
    with pytest.raises(LaunchError, match=r"--base is for one model, and there are a, b; name it in their entries"):
        planned(config, base="owner/base")


def test_a_configuration_in_the_working_directory_is_found(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_application(
        tmp_path / "serve_config.yaml", args={"models": [{"checkpoint": str(tiny_checkpoint), "name": "mine"}]}
    )
    assert planned().args.models[0].served_name == "mine"


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    config = write_application(tmp_path / "c.yaml", args={"generator": {"threads": 0}})
    with pytest.raises(LaunchError, match=r"args\.generator\.threads"):
        planned(config)
    config = write_application(tmp_path / "c.yaml", args={"models": [{"name": "a"}, {"nam": "b"}]})
    with pytest.raises(LaunchError, match=r"args\.models\.1\.nam: there is no such setting"):
        planned(config)


def test_a_missing_checkpoint_aborts_the_start_at_once() -> None:
    with pytest.raises(CheckpointError, match="/nowhere/llava"):
        planned(model="/nowhere/llava")


def test_a_port_in_use_aborts_the_start_at_once(tiny_checkpoint: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} on 127.0.0.1 is already in use"):
            planned(model=str(tiny_checkpoint), port=port)


def test_other_interfaces_are_refused_without_keys(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_application(tmp_path / "c.yaml")
    with pytest.raises(ExposureError, match=r"0\.0\.0\.0.*keys create"):
        planned(config, model=str(tiny_checkpoint), host="0.0.0.0")
    content = {**yaml.safe_load(config.read_text()), "http_options": {"host": "0.0.0.0"}}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ExposureError):
        planned(config, model=str(tiny_checkpoint))
    monkeypatch.chdir(tmp_path)
    config = write_application(tmp_path / "c.yaml", args={"auth": {"keys_file": "keys.json"}})
    with pytest.raises(KeysFileError, match="cannot be read"):
        planned(config, model=str(tiny_checkpoint), host="0.0.0.0")
    Path("keys.json").write_text('{"keys": []}')
    plan = planned(config, model=str(tiny_checkpoint), host="0.0.0.0")
    # Absolute, because replicas have another working directory.
    assert plan.config["applications"][0]["args"]["auth"]["keys_file"] == str(tmp_path / "keys.json")


def test_a_route_prefix_is_part_of_the_address(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(write_application(tmp_path / "c.yaml", route_prefix="/vision/"), model=str(tiny_checkpoint))
    assert plan.url == f"http://127.0.0.1:{plan.port}/vision"
    with pytest.raises(LaunchError, match="no route_prefix"):
        planned(write_application(tmp_path / "c.yaml", route_prefix=None), model=str(tiny_checkpoint))


def test_found_revisions_are_passed_on_so_that_no_stage_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repositories = {repo_id: {OLD: folder} for repo_id, folder in write_lora(tmp_path / "written").items()}
    config = write_application(
        tmp_path / "c.yaml", args={"models": [{"checkpoint": "owner/lora", "template": "vicuna_v1"}]}
    )
    with hub_of(repositories) as hub:
        use_cache(monkeypatch, tmp_path / "cache", hub.url)
        with pytest.raises(CheckpointError, match=r"owner/lora, the model, is neither .* nothing may be fetched"):
            planned(config, offline=True)
        assert hub.asked == []
        plan = planned(config)
        hub.asked.clear()
        handed = plan.config["applications"][0]["args"]
        revisions = dict.fromkeys(repositories, OLD)
        named = {"name": "owner/lora", "checkpoint": "owner/lora", "base": None, "template": "vicuna_v1"}
        assert handed["offline"] is True
        [model] = handed["models"]
        assert {field: value for field, value in model.items() if value != {}} == named | {"revisions": revisions}
        for folders in repositories.values():
            folders[NEW] = folders[OLD]
        [found] = check_checkpoints(AppArgs.model_validate(handed)).values()
        assert found.open().revisions == revisions
        assert hub.asked == []


def test_configured_revisions_are_not_applied_to_another_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = write_application(
        tmp_path / "c.yaml", args={"models": [{"checkpoint": "owner/name", "revisions": {"owner/name": OLD}}]}
    )
    with pytest.raises(CheckpointError, match=f"owner/name at revision {OLD}"):
        planned(config)
    assert planned(config, model=str(tiny_checkpoint)).args.models[0].revisions is None


def test_metrics_use_the_next_port_unless_another_is_chosen(tiny_checkpoint: Path) -> None:
    plan = planned(model=str(tiny_checkpoint))
    assert plan.metrics_port == plan.port + 1
    assert planned(model=str(tiny_checkpoint), metrics_port=0).metrics_port == 0
    # There is no port after the last.
    assert planned(model=str(tiny_checkpoint), port=65535).metrics_port == 0
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LaunchError, match="with --metrics-port"):
        planned(model=str(tiny_checkpoint), metrics_port=taken.getsockname()[1])


def test_a_reload_keeps_the_address_and_may_change_other_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = write_application(tmp_path / "c.yaml", args={"limits": {"max_n": 2}})
    running = planned(config, model=str(tiny_checkpoint))
    with socket.create_server((running.host, running.port)):
        write_application(config, args={"limits": {"max_n": 3}})
        changed = planned(config, model=str(tiny_checkpoint), port=running.port, running=running)
    assert changed.args.limits.max_n == 3
    assert changed.metrics_port == running.metrics_port


@pytest.mark.parametrize(
    "options",
    [{"name": "other"}, {"args": {"gateway": {"max_replicas": 2}}}, {"deployments": [{"name": "Gateway"}]}],
    ids=lambda options: next(iter(options)),
)
def test_changes_that_require_a_restart_are_refused_while_running(
    options: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    running = planned(write_application(config), model=str(tiny_checkpoint))
    with pytest.raises(LaunchError, match="restart it"):
        planned(config, model=str(tiny_checkpoint), running=running)
    write_application(config, **options)
    with pytest.raises(LaunchError, match="restart it"):
        planned(config, model=str(tiny_checkpoint), port=running.port, running=running)


def _several(folder: Path, **second: Any) -> list[dict[str, Any]]:
    return [{"name": "a", "checkpoint": str(folder)}, {"name": "b", "checkpoint": str(folder), **second}]


def test_the_set_of_models_of_a_running_service_is_fixed(
    tiny_checkpoint: Path, checkpoint_copy: Path, tmp_path: Path
) -> None:
    """Their settings may change."""
    config = tmp_path / "c.yaml"
    models = _several(tiny_checkpoint)
    running = planned(write_application(config, args={"models": models}))

    def update(models: list[dict[str, Any]], **args: Any) -> AppArgs:
        write_application(config, args={"models": models, **args})
        return planned(config, port=running.port, running=running).args

    other_tower = {"vision_encoder": {"cache_bytes": 1}}
    for changed in (
        models[:1],
        models[::-1],
        [*models, {"name": "c", "checkpoint": str(tiny_checkpoint)}],
        _several(tiny_checkpoint, name="c"),
        _several(checkpoint_copy),
        _several(tiny_checkpoint, **other_tower),
    ):
        with pytest.raises(LaunchError, match=r"its models .* restart it"):
            update(changed)
    assert update(_several(tiny_checkpoint, template="llava_v0")).models[1].template == "llava_v0"
    assert update(_several(tiny_checkpoint, engine={"max_running": 2})).models[1].engine.max_running == 2
    # The towers are as alike as before.
    assert update(models, **other_tower).models[1].vision_encoder.cache_bytes == 1


def test_adding_a_second_application_requires_a_restart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = write_application(tmp_path / "c.yaml")
    running = planned(config, model=str(tiny_checkpoint))
    add_application(config)
    with pytest.raises(LaunchError, match="restart it"):
        planned(config, model=str(tiny_checkpoint), port=running.port, running=running)
