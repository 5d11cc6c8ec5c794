"""Starting and stopping without a running Ray; test_service.py has one."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.ports import free_port
from deployments.access.exposure import ENTRANCE_VARIABLE
from deployments.errors import LaunchError
from deployments.launch.launcher import ENVIRONMENT, LocalService, _kept_bytes
from deployments.launch.load_balancer import LoadBalancer
from deployments.launch.processes import descendants
from deployments.settings.app import AppArgs
from tests.deployments.launch.plans import add_application, planned, write_application


def test_the_end_of_ray_or_the_balancer_is_reported(tiny_checkpoint: Path) -> None:
    service = LocalService(planned(model=str(tiny_checkpoint)))
    service.check()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as vital:
        service._vital = {each for each in descendants(os.getpid()) if each.pid == vital.pid}
        service.check()
        vital.kill()
    with pytest.raises(LaunchError, match="Ray has ended"):
        service.check()
    service._vital = set()
    # Its HAProxy has ended right after its start.
    service.balancer = LoadBalancer(("127.0.0.1", 1), "127.0.0.1", [], "llava")
    with pytest.raises(LaunchError, match="HAProxy has ended"):
        service.check()


def test_a_balancer_that_has_run_for_some_time_is_restarted(tiny_checkpoint: Path) -> None:
    service = LocalService(planned(model=str(tiny_checkpoint)))
    service.balancer = LoadBalancer(("127.0.0.1", free_port()), "127.0.0.1", [free_port()], "llava")
    service._balanced_at -= 60
    try:
        service.check()
        assert service.balancer.is_running
        running = service.balancer._process
        service.check()
        assert running is service.balancer._process is not None
        # Kill it again; this time it ends at once.
        running.kill()
        running.wait()
        with pytest.raises(LaunchError, match="HAProxy has ended"):
            service.check()
    finally:
        service.balancer.stop()


def test_the_object_store_has_room_for_every_encoders_cache() -> None:
    encoders = [{"cache_bytes": 5}, {"cache_bytes": 7, "min_replicas": 1, "max_replicas": 3}]
    models = [{"name": str(number), "vision_encoder": encoder} for number, encoder in enumerate(encoders)]
    assert _kept_bytes(AppArgs.model_validate({"models": models})) == 5 + 3 * 7


def test_several_applications_run_behind_serves_proxy(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(config: Path) -> LocalService:
        for variable in (*ENVIRONMENT, ENTRANCE_VARIABLE):
            monkeypatch.delenv(variable, raising=False)
        service = LocalService(planned(config, model=str(tiny_checkpoint)))
        with monkeypatch.context() as patched:
            patched.setattr("deployments.launch.launcher.serve_schema", _fail)
            with pytest.raises(LaunchError, match="enough"):
                service.start(lambda _: None)
        assert os.environ[ENTRANCE_VARIABLE] == "127.0.0.1"
        return service

    config = write_application(tmp_path / "c.yaml")
    alone = begin(config)
    assert alone.balancer is not None
    assert (alone.balancer.proxy_port, os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"]) == (0, "1")
    add_application(config)
    beside = begin(config)
    assert beside.balancer is not None
    assert (beside.balancer.proxy_port, os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"]) == (beside.plan.port, "0")


def _fail(*_: object) -> None:
    raise LaunchError("enough")


def _replace_ray(monkeypatch: pytest.MonkeyPatch, init: Callable[..., object]) -> None:
    """Put a function in place of Ray's start, on a cluster without nodes."""
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("deployments.launch.launcher._STOP_PATIENCE_S", 0.0)


@pytest.mark.parametrize("is_begun", [True, False])
def test_stopping_ends_only_processes_it_started(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, is_begun: bool
) -> None:
    """The start fails at different points; the caller has started one process before and one meanwhile."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeper) as foreign:
        service = LocalService(planned(model=str(tiny_checkpoint), metrics_port=0))
        started: list[subprocess.Popen[bytes]] = []

        def init(**_: object) -> SimpleNamespace:
            started.append(subprocess.Popen(sleeper))
            if not is_begun:
                raise Exception("the node timed out")
            return SimpleNamespace(address_info={"session_dir": "/tmp/ray/session_2", "metrics_export_port": 9})

        _replace_ray(monkeypatch, init)
        service.stop()
        message = "no node has num_cpus" if is_begun else r"Ray has not started \(the node timed out\)$"
        with pytest.raises(LaunchError, match=message):
            service.start(lambda _: None)
        with subprocess.Popen(sleeper) as later:
            service.stop()
            assert [each.wait(10) for each in started] == [-signal.SIGKILL] * (1 if is_begun else 2)
            assert foreign.poll() is None
            assert later.poll() is None or not is_begun
            later.kill()
        foreign.kill()
        assert service.logs == (Path("/tmp/ray/session_2/logs/serve") if is_begun else None)
        assert service.metrics_url == ("http://127.0.0.1:9/metrics" if is_begun else None)


def test_ray_gets_a_second_attempt_without_the_first_ones_processes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[subprocess.Popen[bytes]] = []

    def init(**_: object) -> SimpleNamespace:
        assert [each.poll() for each in attempts] == [-signal.SIGKILL] * len(attempts)
        attempts.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(attempts) == 1:
            raise Exception("the node timed out")
        return SimpleNamespace(address_info={"session_dir": "/tmp/ray/session_2", "metrics_export_port": 9})

    _replace_ray(monkeypatch, init)
    service = LocalService(planned(model=str(tiny_checkpoint), metrics_port=0))
    reached: list[str] = []
    with pytest.raises(LaunchError, match="no node has num_cpus"):
        service.start(reached.append)
    service.stop()
    assert [line[:19] for line in reached] == ["Ray has not started", "Ray                "]
    assert [each.wait(10) for each in attempts] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("is_taken", [True, False])
def test_metrics_move_if_another_program_has_taken_their_port(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, *, is_taken: bool
) -> None:
    service = LocalService(planned(model=str(tiny_checkpoint)))
    ports: list[int | None] = []

    def init(*, _metrics_export_port: int | None, **_: object) -> None:
        ports.append(_metrics_export_port)
        raise Exception("the node timed out")

    _replace_ray(monkeypatch, init)
    own = service.plan.metrics_port
    assert own == service.plan.port + 1
    with socket.create_server(("127.0.0.1", own if is_taken else 0)), pytest.raises(LaunchError, match="timed out"):
        service.start(lambda _: None)
    assert ports == [own, None if is_taken else own]


def test_metrics_stay_at_a_port_that_was_asked_for(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("the node timed out")

    _replace_ray(monkeypatch, init)
    service = LocalService(planned(model=str(tiny_checkpoint), metrics_port=(asked := free_port())))
    with (
        socket.create_server(("127.0.0.1", asked)),
        pytest.raises(LaunchError, match=f"port {asked} .* choose another with --metrics-port"),
    ):
        service.start(lambda _: None)


def test_wrong_settings_of_ray_are_not_tried_again(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ValueError("the object store is too large")

    _replace_ray(monkeypatch, init)
    service, reached = LocalService(planned(model=str(tiny_checkpoint), metrics_port=0)), list[str]()
    with pytest.raises(LaunchError, match="the object store is too large"):
        service.start(reached.append)
    service.stop()
    assert reached == []


def test_the_logs_of_a_ray_that_has_not_started_are_named(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / "session_latest").symlink_to("session_of_another")

    def init(**_: object) -> None:
        (folder / "session_latest").unlink()
        (folder / "session_latest").symlink_to("session_1")
        raise ValueError("no")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    _replace_ray(monkeypatch, init)
    service = LocalService(planned(model=str(tiny_checkpoint), metrics_port=0))
    with pytest.raises(LaunchError, match=f"its logs are in {folder}/session_1/logs$"):
        service._init_ray(0)


def test_ray_is_imported_only_after_its_environment_is_set() -> None:
    program = "import sys, deployments.launch.launcher, deployments.commands.serve; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
    assert ENVIRONMENT["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
