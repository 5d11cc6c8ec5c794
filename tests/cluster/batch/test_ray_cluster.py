"""Which Ray a job runs on, and which paths its machines see."""

from pathlib import Path

import pytest

from benchmarks.ports import free_port
from cluster.batch.errors import JobError, OutputError
from cluster.batch.ray_cluster import ENVIRONMENT, check_output_stays, ray_cluster, seen_by_workers, set_environment

COPY = "ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123"


def test_a_jobs_own_ray_has_the_same_environment_as_a_services() -> None:
    from deployments.launch.environment import ENVIRONMENT as OF_A_SERVICE

    assert ENVIRONMENT.items() <= OF_A_SERVICE.items()


def test_a_jobs_own_ray_is_configured_unless_the_user_did_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "theirs")
    monkeypatch.delenv("RAY_AUTH_MODE")
    set_environment()
    import os

    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "theirs"


def test_an_existing_ray_is_left_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    set_environment()
    assert not ENVIRONMENT.keys() & os.environ.keys()


@pytest.mark.parametrize(
    ("address", "message"),
    [(None, "Ray does not start: too slow"), ("auto", "no Ray answers at RAY_ADDRESS=auto: too slow. If .* token")],
)
def test_a_ray_that_does_not_start_or_answer_is_reported(
    monkeypatch: pytest.MonkeyPatch, address: str | None, message: str
) -> None:
    def init(**_: object) -> None:
        raise Exception("too slow")  # As Ray does.

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(JobError, match=message), ray_cluster():
        pass


def test_an_address_where_nothing_listens_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("it would try for minutes"))
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(JobError, match=f"no Ray answers at RAY_ADDRESS={address}: .*refused"), ray_cluster():
        pass


def test_paths_are_absolute_except_in_the_working_dir_copied_by_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert seen_by_workers(Path("in.jsonl")) == tmp_path / "in.jsonl"
    (tmp_path / COPY).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / COPY)
    assert seen_by_workers(Path("in.jsonl")) == Path("in.jsonl")
    assert seen_by_workers(Path("/data/in.jsonl")) == Path("/data/in.jsonl")


def test_an_output_that_ray_would_delete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / COPY).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / COPY)
    check_output_stays(tmp_path / "out.jsonl")
    with pytest.raises(OutputError, match="give an absolute path"):
        check_output_stays(Path("out.jsonl"))
