"""The environment of a local Ray, as far as others depend on it; test_service.py shows that its processes have it."""

from deployments.launch.environment import ENVIRONMENT


def test_replica_ports_require_a_token_unless_the_user_disables_it() -> None:
    assert ENVIRONMENT["RAY_AUTH_MODE"] == "token"


def test_rays_ports_including_metrics_are_on_the_loopback_interface() -> None:
    assert ENVIRONMENT["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
