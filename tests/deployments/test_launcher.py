"""Everything that is judged before Ray starts; test_service.py starts it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deployments.errors import KeysFileError, LaunchError
from deployments.exposure import ExposureError
from deployments.launcher import (
    ENVIRONMENT,
    IMPORT_PATH,
    LaunchPlan,
    LocalService,
    check_resources,
    plan_launch,
)
from deployments.load_balancer import LoadBalancer
from deployments.preflight import check_checkpoint
from deployments.processes import descendants
from deployments.settings import AppArgs, GeneratorArgs
from llava_core.errors import CheckpointError
from tests.hub import NEW, OLD, hub_of, use_cache, write_lora
from tests.original import Kind, write_original


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write(path: Path, **application: Any) -> Path:
    content = {"applications": [{"name": "app", "route_prefix": "/", "import_path": IMPORT_PATH, **application}]}
    path.write_text(yaml.safe_dump(content))
    return path


def _plan(config: Path | None = None, **options: Any) -> LaunchPlan:
    return plan_launch(config, **{"port": _free_port(), **options})


def test_without_a_configuration_there_are_defaults(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = _plan(model=str(tiny_checkpoint))
    assert plan.args.checkpoint == str(tiny_checkpoint)
    assert plan.url == f"http://127.0.0.1:{plan.port}"
    assert plan.config["http_options"] == {"host": "127.0.0.1", "port": plan.port}


def test_options_override_the_configuration(tiny_checkpoint: Path, tmp_path: Path) -> None:
    args = {"model": "/somewhere/else", "engine": {"max_running": 3}, "auth": {"allow_anyone": True}}
    plan = _plan(_write(tmp_path / "c.yaml", args=args), model=str(tiny_checkpoint), host="0.0.0.0")
    assert plan.args.engine.max_running == 3
    assert plan.config["applications"][0]["args"]["model"] == str(tiny_checkpoint)
    assert plan.config["http_options"]["host"] == "0.0.0.0"
    assert plan.url.startswith("http://127.0.0.1:")


def test_a_relative_model_becomes_absolute_and_keeps_its_name(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_checkpoint.parent)
    plan = _plan(model=tiny_checkpoint.name)
    args = plan.config["applications"][0]["args"]
    assert (args["model"], args["model_name"]) == (str(tiny_checkpoint), tiny_checkpoint.name)


def test_a_base_is_found_too_and_another_model_does_not_get_it(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = write_original(tmp_path, Kind(layout="projector", tower_inside=True))
    assert original.base is not None
    monkeypatch.chdir(original.base.parent)
    plan = _plan(model=str(original.folder), base=original.base.name)
    assert plan.config["applications"][0]["args"]["base"] == str(original.base)
    stated = _write(tmp_path / "c.yaml", args={"model": str(original.folder), "base": str(original.base)})
    assert _plan(stated).args.base == str(original.base)
    assert _plan(stated, model=str(tiny_checkpoint)).args.base is None


def test_a_configuration_in_the_working_directory_is_found(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "serve_config.yaml", args={"model": str(tiny_checkpoint), "model_name": "mine"})
    assert _plan().args.served_name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not YAML"),
        ("- 1", "must hold a Serve configuration"),
        ("applications: []", "names no application"),
        ("applications: [{import_path: other:app}]", "names no application"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(LaunchError, match=message):
        _plan(tmp_path / "c.yaml")


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be read"):
        _plan(tmp_path / "none.yaml")


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    config = _write(tmp_path / "c.yaml", args={"generator": {"threads": 0}})
    with pytest.raises(LaunchError, match=r"args\.generator\.threads"):
        _plan(config)


def test_a_missing_checkpoint_ends_the_start_at_once() -> None:
    with pytest.raises(CheckpointError, match="/nowhere/llava"):
        _plan(model="/nowhere/llava")


def test_a_port_in_use_ends_the_start_at_once(tiny_checkpoint: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} on 127.0.0.1 is already in use"):
            _plan(model=str(tiny_checkpoint), port=port)


def test_it_is_said_when_ray_or_the_balancer_has_ended(tiny_checkpoint: Path) -> None:
    service = LocalService(_plan(model=str(tiny_checkpoint)))
    service.check()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as vital:
        service._vital = {each for each in descendants(os.getpid()) if each.pid == vital.pid}
        service.check()
        vital.kill()
    with pytest.raises(LaunchError, match="Ray has ended"):
        service.check()
    service._vital = set()
    service.balancer = LoadBalancer(("127.0.0.1", 1), "127.0.0.1", [], "llava")
    with pytest.raises(LaunchError, match="HAProxy has ended"):
        service.check()


def test_several_applications_stand_behind_serves_proxy(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(config: Path) -> str:
        for variable in ENVIRONMENT:
            monkeypatch.delenv(variable, raising=False)
        service = LocalService(_plan(config, model=str(tiny_checkpoint)))
        monkeypatch.setattr(service, "_schema", lambda _: (_ for _ in ()).throw(LaunchError("enough")))
        with pytest.raises(LaunchError, match="enough"):
            service.start(lambda _: None)
        return os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"]

    config = _write(tmp_path / "c.yaml")
    assert begin(config) == "1"
    content = yaml.safe_load(config.read_text())
    content["applications"].append({"name": "b", "route_prefix": "/b", "import_path": "b:app"})
    config.write_text(yaml.safe_dump(content))
    assert begin(config) == "0"


def test_nobody_is_let_in_from_elsewhere_without_keys(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _write(tmp_path / "c.yaml")
    with pytest.raises(ExposureError, match=r"0\.0\.0\.0.*keys create"):
        _plan(config, model=str(tiny_checkpoint), host="0.0.0.0")
    content = {**yaml.safe_load(config.read_text()), "http_options": {"host": "0.0.0.0"}}
    config.write_text(yaml.safe_dump(content))
    with pytest.raises(ExposureError):
        _plan(config, model=str(tiny_checkpoint))
    monkeypatch.chdir(tmp_path)
    config = _write(tmp_path / "c.yaml", args={"auth": {"keys_file": "keys.json"}})
    with pytest.raises(KeysFileError, match="cannot be read"):
        _plan(config, model=str(tiny_checkpoint), host="0.0.0.0")
    Path("keys.json").write_text('{"keys": []}')
    plan = _plan(config, model=str(tiny_checkpoint), host="0.0.0.0")
    # Replicas work elsewhere.
    assert plan.config["applications"][0]["args"]["auth"]["keys_file"] == str(tmp_path / "keys.json")


def test_a_route_prefix_is_part_of_the_address(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = _plan(_write(tmp_path / "c.yaml", route_prefix="/vision/"), model=str(tiny_checkpoint))
    assert plan.url == f"http://127.0.0.1:{plan.port}/vision"
    with pytest.raises(LaunchError, match="no route_prefix"):
        _plan(_write(tmp_path / "c.yaml", route_prefix=None), model=str(tiny_checkpoint))


def test_what_was_found_is_handed_on_with_its_revisions_and_no_stage_fetches_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repositories = {repo_id: {OLD: folder} for repo_id, folder in write_lora(tmp_path / "written").items()}
    config = _write(tmp_path / "c.yaml", args={"model": "owner/lora", "template": "vicuna_v1"})
    with hub_of(repositories) as hub:
        use_cache(monkeypatch, tmp_path / "cache", hub.url)
        with pytest.raises(CheckpointError, match=r"owner/lora, the model, is neither .* nothing may be fetched"):
            _plan(config, offline=True)
        assert hub.asked == []
        plan = _plan(config)
        hub.asked.clear()
        handed = plan.config["applications"][0]["args"]
        assert handed == {
            "model": "owner/lora",
            "base": None,
            "template": "vicuna_v1",
            "model_name": "owner/lora",
            "revisions": dict.fromkeys(repositories, OLD),
            "offline": True,
        }
        for folders in repositories.values():
            folders[NEW] = folders[OLD]
        found = check_checkpoint(AppArgs.model_validate(handed))
        assert found.open().revisions == handed["revisions"]
        assert hub.asked == []


def test_another_model_does_not_get_the_revisions_of_the_configurations(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = _write(tmp_path / "c.yaml", args={"model": "owner/name", "revisions": {"owner/name": OLD}})
    with pytest.raises(CheckpointError, match=f"owner/name at revision {OLD}"):
        _plan(config)
    assert _plan(config, model=str(tiny_checkpoint)).args.revisions is None


def test_metrics_are_at_the_port_after_the_services_unless_another_is_chosen(tiny_checkpoint: Path) -> None:
    plan = _plan(model=str(tiny_checkpoint))
    assert plan.metrics_port == plan.port + 1
    assert _plan(model=str(tiny_checkpoint), metrics_port=0).metrics_port == 0
    # There is none after the last.
    assert _plan(model=str(tiny_checkpoint), port=65535).metrics_port == 0
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LaunchError, match="with --metrics-port"):
        _plan(model=str(tiny_checkpoint), metrics_port=taken.getsockname()[1])


@pytest.mark.parametrize("is_begun", [True, False])
def test_stopping_ends_what_was_started_and_no_process_of_the_callers(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, is_begun: bool
) -> None:
    """A start that fails at different points, with a process of the caller's begun before and another one meanwhile."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("deployments.launcher._STOP_PATIENCE_S", 0.0)
    with subprocess.Popen(sleeper) as foreign:
        service = LocalService(_plan(model=str(tiny_checkpoint), metrics_port=0))
        started: list[subprocess.Popen[bytes]] = []

        def init(**_: object) -> SimpleNamespace:
            started.append(subprocess.Popen(sleeper))
            if not is_begun:
                raise LaunchError("Ray did not start")
            return SimpleNamespace(address_info={"session_dir": "/tmp/ray/session_2", "metrics_export_port": 9})

        monkeypatch.setattr("ray.init", init)
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 0.0})
        service.stop()
        with pytest.raises(LaunchError):
            service.start(lambda _: None)
        with subprocess.Popen(sleeper) as later:
            service.stop()
            assert started[0].wait(10) == -signal.SIGKILL
            assert foreign.poll() is None
            assert later.poll() is None or not is_begun
            later.kill()
        foreign.kill()
        assert service.logs == (Path("/tmp/ray/session_2/logs/serve") if is_begun else None)
        assert service.metrics_url == ("http://127.0.0.1:9/metrics" if is_begun else None)


def test_ray_is_imported_only_after_its_environment_is_set() -> None:
    program = "import sys, deployments.launcher, deployments.cli; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
    assert ENVIRONMENT["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_resources_that_are_not_there_end_the_start() -> None:
    check_resources(AppArgs(), {"CPU": 1.0})
    with pytest.raises(LaunchError, match=r"ask for 1 CPUs in all, and this machine has 0\.5"):
        check_resources(AppArgs(), {"CPU": 0.5})
    with pytest.raises(LaunchError, match="ask for 2 GPUs in all, and this machine has 0; lower num_gpus"):
        check_resources(AppArgs(generator=GeneratorArgs(num_gpus=1, min_replicas=2, max_replicas=2)), {"CPU": 8.0})
