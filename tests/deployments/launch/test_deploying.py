"""What is read from a configuration, and how long the start is awaited; test_draining.py deploys to a real Serve."""

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import LaunchError
from deployments.launch.deploying import serve_schema, watch

APPLICATION = {"name": "app", "route_prefix": "/", "import_path": "a:b"}
CONFIG: dict[str, Any] = {"applications": [APPLICATION], "http_options": {"port": 9}}


def test_serves_proxy_gets_the_requested_address() -> None:
    schema = serve_schema(CONFIG, "127.64.0.1", 0)
    assert (schema.http_options.host, schema.http_options.port) == ("127.64.0.1", 0)
    assert [each.name for each in schema.applications] == ["app"]


def test_settings_that_serve_refuses_are_named() -> None:
    with pytest.raises(LaunchError, match=r"wrong at applications\.0\.import_path"):
        serve_schema({"applications": [{"name": "app", "import_path": 3}]}, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"proxylocation": "HeadOnly"}, "proxylocation"),
        ({"http_options": {"prot": 9}}, r"http_options\.prot"),
        ({"applications": [{**APPLICATION, "nmae": "app"}]}, r"applications\.0\.nmae"),
    ],
)
def test_fields_that_serve_would_ignore_are_named(given: dict[str, Any], where: str) -> None:
    with pytest.raises(LaunchError, match=f"wrong at {where}: Serve's settings there are "):
        serve_schema({**CONFIG, **given}, "127.0.0.1", 0)


def _overview(status: str, message: str = "", **deployments: str) -> Any:
    """Return the status of an application; one that Serve does not know yet has no deployments."""
    return SimpleNamespace(
        app_status=SimpleNamespace(status=_Status(status), message=message),
        deployment_statuses=[SimpleNamespace(name=name, status=each, message="") for name, each in deployments.items()],
    )


class _Status(str):
    """Like Serve's statuses, a string with a `value`."""

    @property
    def value(self) -> str:
        return str(self)


def _script_overviews(monkeypatch: pytest.MonkeyPatch, *overviews: Any) -> None:
    """Let Serve's controller report these overviews, one after the other."""
    seen = iter(overviews)
    client = SimpleNamespace(get_serve_status=lambda name: next({"app": seen}[name]))
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)


def test_each_stage_is_reported_once_until_the_application_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _script_overviews(
        monkeypatch,
        _overview("NOT_STARTED"),
        _overview("DEPLOYING", A="UPDATING", B="HEALTHY"),
        _overview("RUNNING", A="HEALTHY", B="HEALTHY"),
    )
    assert list(watch("app")) == ["B", "A"]


def test_a_stage_that_cannot_start_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    _script_overviews(monkeypatch, _overview("DEPLOY_FAILED", "CheckpointError: no such folder", A="UNHEALTHY"))
    with pytest.raises(LaunchError, match="no such folder"):
        list(watch("app"))
